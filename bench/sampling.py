"""What choosing tokens costs the processor, by vocabulary and parameters: by tensors and by native
kernels in turn, in steps whose tokens and likeliest were compared first. With --layers: what an
output layer and a draw with top_p cost, in full and screened, to the same tokens; its weights are
random, its logits spread as a trained model's do, and some stand out or none.

python -m bench.sampling [--layers] [--rows N] [--json FILE]
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from fader_adapters.kernels.native import (
    PlainPanels,
    Screen,
    Site,
    Workspace,
    isa,
    set_threads,
    threads,
)
from fader_adapters.kernels.native.logits import Draws, draw
from fader_adapters.kernels.native.screen import NUCLEUS_ROWS, Wanted
from fader_server.bench.machine import machine_facts
from fader_server.core import Request, RowResult, SamplingParams, Sequence
from fader_server.model.distribution import NativeDistributions, TorchDistributions
from fader_server.model.sampler import Sampler

VOCABULARIES = (32_000, 151_936)
CASES: Mapping[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature 1": SamplingParams(),
    "0.6, top_p 0.9": SamplingParams(temperature=0.6, top_p=0.9),
    "0.6, top_k 20, top_p 0.95": SamplingParams(temperature=0.6, top_k=20, top_p=0.95),
    "greedy, 5 logprobs": SamplingParams(temperature=0.0, logprobs=5),
}
SPREAD = 2.0
"""Of the logits: flat enough that a nucleus is wide."""
WIDTH, LAYER_SPREAD = 896, 3.0
"""Inputs of the output layer, and the standard deviation of most of its logits."""
STANDING_OUT: Mapping[str, tuple[float, float, int]] = {
    "sharp": (26.0, 3.0, 20),
    "trained": (22.0, 2.5, 30),
    "flat": (0.0, 0.0, 0),
}
"""The largest logit of those that stand out, what each e-fold of their rank takes, how many."""
HEATS, TOP_P = (0.6, 1.0), 0.9
TURN, SETTLED = 6, 3
"""Steps of one way before the other's, and how many begin while the other's threads still spin."""


def sequences(params: SamplingParams, rows: int) -> list[Sequence]:
    return [Sequence(Request(str(row), (1, 2, 3), params), [1, 2, 3]) for row in range(rows)]


def alike(found: list[RowResult], others: list[RowResult]) -> bool:
    """The same tokens, and the same likeliest ones."""

    def plain(results: list[RowResult]) -> list[Any]:
        tops = [None if r.logprob is None else [t for t, _ in r.logprob.top] for r in results]
        return [[r.token for r in results], tops]

    return plain(found) == plain(others)


def measure(vocabulary: int, rows: int, params: SamplingParams, repeats: int) -> dict[str, float]:
    """Median milliseconds a step of each way. Raises RuntimeError where they differ."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(rows, vocabulary, generator=generator) * SPREAD
    asked = sequences(params, rows)
    ways = {"tensors": Sampler(TorchDistributions()), "native": Sampler(NativeDistributions())}
    first, second = (way.sample(logits, asked) for way in ways.values())
    if not alike(first, second):
        raise RuntimeError(f"tokens differ: {vocabulary} tokens, {params}")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            torch.set_num_threads(1 if name == "native" else threads())
            for turn in range(TURN):
                began = time.perf_counter()
                way.sample(logits, asked)
                if turn >= SETTLED:
                    times[name].append((time.perf_counter() - began) * 1e3)
    return {name: median(own) for name, own in times.items()}


class Layer:
    """An output layer of random weights over the larger vocabulary."""

    def __init__(self) -> None:
        size, generator = max(VOCABULARIES), torch.Generator().manual_seed(1)
        spread = LAYER_SPREAD / math.sqrt(WIDTH)
        self.weight = (torch.randn(size, WIDTH, generator=generator) * spread).bfloat16()
        self.panels, self.scratch = PlainPanels.pack(self.weight), Workspace()
        self.renew()

    def renew(self) -> None:
        """Forget what was in vain."""
        screen = Screen.of(self.panels)
        assert screen is not None
        self.site, self.screen = Site(self.panels), screen
        self.site.leave_out(screen)

    def inputs(self, rows: int, kind: str, generator: torch.Generator) -> Tensor:
        top, fall, count = STANDING_OUT[kind]
        x = torch.randn(rows, WIDTH, generator=generator)
        for row in x if count else ():
            own = self.weight[torch.randint(len(self.weight), (count,), generator=generator)]
            goal = top - fall * torch.arange(1, count + 1).log() - own.float() @ row
            row += torch.linalg.lstsq(own.float(), goal[:, None], driver="gelsd").solution[:, 0]
        return x.bfloat16()

    def tokens(self, x: Tensor, wanted: list[Wanted], way: str, out: Tensor) -> Tensor:
        if way == "full":
            self.site(x, out=out)
        else:
            with self.screen.keeping(wanted):
                self.site(x, out=out)
        size = len(wanted)
        given = Draws(
            heat=torch.tensor([row.heat for row in wanted]),
            top_k=torch.zeros(size, dtype=torch.int64),
            top_p=torch.full((size,), TOP_P, dtype=torch.float64),
            min_p=torch.zeros(size, dtype=torch.float64),
            key=torch.tensor([row.key for row in wanted]),
        )
        return draw(out, given, scratch=self.scratch)

    def measure(self, rows: int, kind: str, heat: float, repeats: int) -> dict[str, Any]:
        """Median and mean milliseconds of the processor a step of each way, by one thread, and how
        many likely tokens the rows have, exp of their entropy. Raises RuntimeError where tokens
        differ."""
        self.renew()
        generator = torch.Generator().manual_seed(rows)
        out, times = torch.empty(rows, len(self.weight)), {"full": [], "screened": []}
        likely = []
        for step in range(repeats):
            x = self.inputs(rows, kind, generator)
            keys = torch.randint(1 << 60, (rows,), generator=generator).tolist()
            wanted = [Wanted(heat=heat, key=key, top_p=TOP_P) for key in keys]
            found = []
            for way in sorted(times, reverse=bool(step % 2)):
                began = time.thread_time()
                found.append(self.tokens(x, wanted, way, out))
                times[way].append((time.thread_time() - began) * 1e3)
                if way == "full":
                    logs = torch.log_softmax(out.double() / heat, -1)
                    likely += (-(logs.exp() * logs).sum(-1)).exp().tolist()
            if not torch.equal(*found):
                raise RuntimeError(f"tokens differ: {kind}, {rows} rows at {heat}")
        result = {f"{way} median": median(own) for way, own in times.items()}
        result |= {f"{way} mean": fmean(own) for way, own in times.items()}
        return {"rows": rows, "logits": kind, "heat": heat, "likely": median(likely), **result}


def steps(rows: int, repeats: int) -> list[dict[str, Any]]:
    cases = []
    for vocabulary in VOCABULARIES:
        for name, params in CASES.items():
            found = measure(vocabulary, rows, params, repeats)
            cases.append({"vocabulary": vocabulary, "rows": rows, "case": name, **found})
            print(
                f"{vocabulary:>7} tokens, {rows} rows, {name}: "
                f"{found['tensors']:.2f} ms by tensors, {found['native']:.2f} ms natively"
            )
    return cases


def layers(repeats: int) -> list[dict[str, Any]]:
    layer, found = Layer(), []
    for kind in STANDING_OUT:
        for heat in HEATS:
            for rows in (1, 2, NUCLEUS_ROWS, 8):
                found.append(own := layer.measure(rows, kind, heat, repeats))
                print(
                    f"{kind}, {own['likely']:.1f} likely tokens, {rows} rows at {heat}: "
                    f"{own['full mean']:.2f} ms in full, {own['screened mean']:.2f} ms screened"
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    set_threads(1 if given.layers else torch.get_num_threads())
    cases = layers(20 * given.repeats) if given.layers else steps(given.rows, given.repeats)
    if given.json:
        facts = {"machine": machine_facts(), "isa": isa(), "threads": threads()}
        command = ["python", "-m", "bench.sampling", *sys.argv[1:]]
        result = {"command": command, **facts, "repeats": given.repeats, "cases": cases}
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
