"""What choosing tokens costs the processor, by vocabulary and parameters: by tensors and by native
kernels in turn, in steps whose tokens and likeliest were compared first.

python -m bench.sampling [--rows N] [--json FILE]
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fader_adapters.kernels.native import isa, set_threads, threads
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    set_threads(torch.get_num_threads())
    cases = []
    for vocabulary in VOCABULARIES:
        for name, params in CASES.items():
            found = measure(vocabulary, given.rows, params, given.repeats)
            cases.append({"vocabulary": vocabulary, "rows": given.rows, "case": name, **found})
            print(
                f"{vocabulary:>7} tokens, {given.rows} rows, {name}: "
                f"{found['tensors']:.2f} ms by tensors, {found['native']:.2f} ms natively"
            )
    if given.json:
        facts = {"machine": machine_facts(), "isa": isa(), "threads": threads()}
        command = ["python", "-m", "bench.sampling", *sys.argv[1:]]
        result = {"command": command, **facts, "repeats": given.repeats, "cases": cases}
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
