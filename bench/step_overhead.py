"""What share of a decode step is spent outside tensor work. In-process: no HTTP, no engine thread.

A step here is plan → upload → run → commit. Tensor work is torch's operators (their own time, from
torch's profiler) and calls into the native kernels (timed around each call). The rest is Python:
bookkeeping, transformers' modules, the glue. The profiler slows a step, mostly outside operators,
and stretches operators a little, so two shares are given; on a quiet machine the true one lies
between them, and where they cross the machine was not quiet:

    outside_plain    = (plain step − tensor work) / plain step
    outside_profiled = (profiled step − tensor work) / profiled step

    python -m bench.step_overhead MODEL [--adapters DIR] [--rows 16]
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.step_rig import Rig, Steps, read_adapters
from fader_adapters.kernels import native
from fader_adapters.kernels.backend import choose
from fader_adapters.kernels.native import Workspace, threads
from fader_adapters.kernels.native.library import library
from fader_server.bench.machine import machine_facts
from fader_server.bench.stats import spread
from fader_server.model.device import set_threads
from fader_server.model.loader import load_base

PARITY_TOKENS = 8
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Round:
    """One plain and one profiled run of the same number of steps, in milliseconds a step."""

    step_ms: float
    plan_ms: float
    commit_ms: float
    tensor_ms: float
    profiled_step_ms: float
    outside_plain: float
    outside_profiled: float


DIRECT = ("fader_map", "fader_panel_rows", "fader_rms_norm")
"""Kernels that are called without borrowed scratch, looked up at every call."""


@contextmanager
def native_calls() -> Iterator[list[float]]:
    """Seconds of every call into the native kernels while the context lasts."""
    seconds: list[float] = []

    def timed(function: Callable[..., int]) -> Callable[..., int]:
        def call(*words: object) -> int:
            before = time.perf_counter()
            code = function(*words)
            seconds.append(time.perf_counter() - before)
            return code

        return call

    borrowing = Workspace.call

    def borrow(self: Workspace, function: Callable[..., int], what: str, *args: object) -> None:
        borrowing(self, timed(function), what, *args)

    kernels = library() if native.available() else None
    direct = {name: getattr(kernels, name) for name in DIRECT} if kernels else {}
    Workspace.call = borrow
    for name, function in direct.items():
        setattr(kernels, name, timed(function))
    try:
        yield seconds
    finally:
        Workspace.call = borrowing
        for name, function in direct.items():
            setattr(kernels, name, function)


def profiled(rig: Rig, count: int) -> Steps:
    """`count` decode steps under the profiler, with the tensor work among them."""
    with native_calls() as calls, profile(activities=[ProfilerActivity.CPU]) as recorded:
        steps = rig.steps(count)
    operators = [e for e in recorded.key_averages() if e.key.startswith("aten::")]
    assert operators, "the profiler recorded no operator"
    steps.tensor = sum(e.self_cpu_time_total for e in operators) / 1e3 + sum(calls) * 1e3
    return steps


def measure(rig: Rig, prompts: list[tuple[int, ...]], *, rounds: int, steps: int) -> list[Round]:
    """`rounds` times plain and profiled, each from the same prompts and so the same contexts."""
    found = []
    for _ in range(rounds):
        both = []
        for run in (rig.steps, lambda count: profiled(rig, count)):
            rig.fill(prompts, max_tokens=steps + 64)
            rig.prefill(len(prompts))
            rig.steps(3)
            both.append(run(steps))
            rig.empty()
        plain, traced = both
        found.append(
            Round(
                step_ms=plain.wall / steps,
                plan_ms=statistics.fmean(plain.plan),
                commit_ms=statistics.fmean(plain.commit),
                tensor_ms=traced.tensor / steps,
                profiled_step_ms=traced.wall / steps,
                outside_plain=(plain.wall - traced.tensor) / plain.wall,
                outside_profiled=(traced.wall - traced.tensor) / traced.wall,
            )
        )
    return found


def quiet(rounds: list[Round]) -> bool:
    """Whether the rounds agree to a fifth and no plain step did worse than its profiled one."""
    steps = [one.step_ms for one in rounds]
    crossed = any(one.step_ms > one.profiled_step_ms for one in rounds)
    return max(steps) <= 1.2 * min(steps) and not crossed


def check_parity(rig: Rig, prompts: list[tuple[int, ...]]) -> None:
    """The first request must give the same tokens alone and among all rows."""
    answers = []
    for chosen in (prompts[:1], prompts):
        rig.fill(chosen, max_tokens=64)
        tokens = rig.prefill(len(chosen))["r0"]
        while len(tokens) < PARITY_TOKENS:
            tokens += [token for name, token in rig.step(lambda: None)[1] if name == "r0"]
        answers.append(tokens[:PARITY_TOKENS])
        rig.empty()
    if answers[0] != answers[1]:
        sys.exit(f"parity failed, no figures: alone {answers[0]}, among all rows {answers[1]}")


def main() -> None:
    """Read the command line, prove parity, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument(
        "--adapters", type=Path, help="folder of PEFT adapters; rows take them in turn"
    )
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--context", type=int, default=128, help="prompt tokens of every row")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="as `fader serve` takes it")
    parser.add_argument("--backend", choices=("auto", "reference"), default="auto")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    device, dtype = torch.device("cpu"), DTYPES[words.dtype]
    backend = choose(device, dtype, words.backend)
    set_threads(words.threads, backend)
    base = load_base(words.model, dtype=dtype, device=device, backend=backend)
    adapters = read_adapters(words.adapters, base, words.rows) if words.adapters else []
    length = words.context + max(words.steps, PARITY_TOKENS) + 64 + words.rows * 2
    rig = Rig(base, adapters, rows=words.rows, length=length)
    rng = random.Random(words.seed)
    prompts = [
        tuple(rng.choices(range(base.vocab_size), k=words.context)) for _ in range(words.rows)
    ]
    check_parity(rig, prompts)
    rounds = measure(rig, prompts, rounds=words.rounds, steps=words.steps)
    report = {
        "command": sys.argv,
        "machine": machine_facts()
        | {
            "torch": torch.__version__,
            "threads": threads(),
            "torch_threads": torch.get_num_threads(),
        },
        "backend": base.backend.name,
        "adapters": len(adapters),
        "quiet": quiet(rounds),
        "rounds": [asdict(one) for one in rounds],
    }
    print(
        f"{base.backend.name}, {words.rows} rows, {len(adapters)} adapters, "
        f"{words.rounds} rounds of {words.steps} steps; median [least, greatest]"
    )
    for name in Round.__dataclass_fields__:
        value = spread(getattr(one, name) for one in rounds)
        print(f"  {name:17} {value.median:8.3f} [{value.low:.3f}, {value.high:.3f}]")
    if not quiet(rounds):
        print("note: the machine was not quiet, do not quote these figures")
    if words.json:
        words.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
