"""How far decode steps and prefill are from what this machine's cores and memory allow.

    python -m bench.step_limits MODEL [--adapters DIR] [--json OUT]

The limits (DRAM read, bf16 dot products) are measured in turn with the steps. A floor is the larger
of floating-point operations over the dot limit and bytes over the read limit; what requests take at
least is the sum of their floors. No figure before a row's answer is the same in company.
"""

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.step_overhead import check_parity
from bench.step_rig import HostAdapter, Rig, read_adapters
from fader_adapters.kernels.backend import choose
from fader_adapters.kernels.measure.limits import Limits
from fader_adapters.kernels.native import isa, threads
from fader_adapters.kernels.native.screen import ROWS
from fader_server.bench.machine import machine_facts
from fader_server.model.device import set_threads
from fader_server.model.loaded import LoadedBase
from fader_server.model.loader import load_base

PROMPT, OUTPUT = 128, 64
STREAMED = 512 << 20


@dataclass(frozen=True, slots=True)
class Work:
    """What a forward has to do at least."""

    flop: float
    read_bytes: float


@dataclass(frozen=True, slots=True)
class Case:
    """One number of rows; milliseconds are medians."""

    rows: int
    adapters: int
    step_ms: float
    step_floor_ms: float
    prefill_tokens_per_s: float
    prefill_most_tokens_per_s: float
    most_output_tokens_per_s: float
    """Of `rows` requests of PROMPT + OUTPUT tokens, if nothing but the floors took time."""


def token_flop(base: LoadedBase, adapter: HostAdapter | None) -> float:
    """Twice the weights one token is multiplied by in the decoder, without attention."""
    linears = base.installed.spec.linears
    weights = sum(i.in_features * i.out_features for i in linears if i.role == "linear")
    low_rank = adapter.flat.numel() if adapter else 0
    return 2.0 * (weights + low_rank)


def step_work(base: LoadedBase, rows: int, context: int, adapters: list[HostAdapter]) -> Work:
    """One decode step: every weight once (of a screened output layer its codes), every row's cache,
    every adapter's matrices once."""
    head = next(i for i in base.installed.spec.linears if i.role == "head")
    head_weights = head.in_features * head.out_features
    cached = sum(s.kv_heads * (s.head_dim + s.value_dim) for s in base.layers.values())
    used = [adapters[row % len(adapters)] for row in range(rows)] if adapters else []
    low_rank = sum(adapter.flat.numel() for adapter in used)
    flop = rows * (token_flop(base, None) + 2.0 * head_weights) + 2.0 * low_rank
    distinct = {id(adapter): adapter.flat.nbytes for adapter in used}
    head_bytes = head_weights * base.dtype.itemsize
    if base.screen is not None and rows <= ROWS:
        head_bytes = base.screen.nbytes
    cache_bytes = rows * context * cached * base.dtype.itemsize
    moved = base.installed.nbytes + head_bytes + cache_bytes + sum(distinct.values())
    return Work(flop, moved)


def reach(limits: list[tuple[float, float]]) -> tuple[float, float]:
    """GB/s and GFLOP/s: the best seen, so that no floor is too high."""
    return max(read for read, _ in limits), max(dot for _, dot in limits)


def probe(limits: Limits) -> tuple[float, float]:
    """DRAM read in GB/s and dot products in GFLOP/s, once."""
    timed = []
    for call in limits.methods.values():
        start = time.perf_counter()
        call()
        timed.append(time.perf_counter() - start)
    return limits.read_bytes / timed[0] / 1e9, limits.dot_flop / timed[1] / 1e9


def timed_prefill(rig: Rig, prompts: list[tuple[int, ...]]) -> float:
    """Seconds until every row decodes, the decode steps in between included."""
    start = time.perf_counter()
    rig.prefill(len(prompts))
    return time.perf_counter() - start


def measure(
    base: LoadedBase, adapters: list[HostAdapter], rows: int, *, repeats: int, limits: Limits
) -> tuple[Case, list[tuple[float, float]]]:
    """Steps and limits in turn. Exits when parity fails."""
    rig = Rig(base, adapters, rows=rows, length=PROMPT + 4 * OUTPUT)
    rng = random.Random(rows)
    prompts = [tuple(rng.choices(range(base.vocab_size), k=PROMPT)) for _ in range(rows)]
    check_parity(rig, prompts)
    steps, prefills, seen = [], [], []
    for _ in range(repeats):
        rig.fill(prompts, max_tokens=2 * OUTPUT)
        prefills.append(timed_prefill(rig, prompts))
        rig.steps(3)
        steps += rig.steps(OUTPUT // 2).run
        rig.empty()
        seen += [probe(limits) for _ in range(5)]
    read, dot = reach(seen)
    work = step_work(base, rows, PROMPT + OUTPUT // 2, adapters)
    floor = max(work.flop / dot / 1e9, work.read_bytes / read / 1e9)
    each = token_flop(base, adapters[0] if adapters else None)
    least = rows * PROMPT * each / dot / 1e9 + OUTPUT * floor
    case = Case(
        rows=rows,
        adapters=min(rows, len(adapters)),
        step_ms=statistics.median(steps),
        step_floor_ms=floor * 1e3,
        prefill_tokens_per_s=rows * PROMPT / statistics.median(prefills),
        prefill_most_tokens_per_s=dot * 1e9 / each,
        most_output_tokens_per_s=rows * OUTPUT / least,
    )
    return case, seen


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--adapters", type=Path, help="folder of PEFT adapters")
    parser.add_argument("--rows", default="1,8,16", help="numbers of rows, with commas between")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="by default all cores")
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    device, dtype = torch.device("cpu"), torch.bfloat16
    backend = choose(device, dtype, "native")
    set_threads(words.threads, backend)
    base = load_base(words.model, dtype=dtype, device=device, backend=backend)
    adapters = read_adapters(words.adapters, base, 16) if words.adapters else []
    limits, cases, seen = Limits(STREAMED, threads()), [], []
    for rows in map(int, words.rows.split(",")):
        for used in ([], adapters) if adapters else ([],):
            case, probes = measure(base, used, rows, repeats=words.repeats, limits=limits)
            cases.append(case)
            seen += probes
            told = (
                f"{case.rows} rows, {case.adapters} adapters: step {case.step_ms:.2f} ms (floor "
                f"{case.step_floor_ms:.2f}), prefill {case.prefill_tokens_per_s:.0f} tokens/s (at "
                f"most {case.prefill_most_tokens_per_s:.0f}); {PROMPT} + {OUTPUT} tokens each: at "
                f"most {case.most_output_tokens_per_s:.0f} output tokens/s"
            )
            print(told, flush=True)
    read, dot = reach(seen)
    print(f"limits: {read:.1f} GB/s, {dot:.0f} GFLOP/s with {threads()} threads")
    report = {
        "command": ["python", "-m", "bench.step_limits", *sys.argv[1:]],
        "machine": machine_facts() | {"torch": torch.__version__, "threads": threads()},
        "isa": isa(),
        "read_gb_s": read,
        "dot_gflop_s": dot,
        "cases": [asdict(case) for case in cases],
    }
    if words.json:
        words.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
