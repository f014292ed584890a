"""Bases whose recorded steps are compared with the steps of the model's own code."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tests.support.families import outside, write_family
from tests.support.peft_adapters import write_adapter
from tests.support.world import Ask, TinyWorld

QUICK = frozenset({"gemma3", "gpt2", "llama"})
"""Families whose steps are compared in every run: windows and norms of heads; learned positions and
biases; what most share."""
BLENDS: list[Mapping[str, float]] = [{}, {"a": 1.0}, {"b": 0.5}, {"a": 0.7, "b": -0.4}]

Written = tuple[Path, Sequence[Path]]
"""A base and its adapters, of which at most two: a and b."""
Answers = list[tuple[list[int], list[float]]]
"""The tokens of each request and their logprobs."""


def write(name: str, folder: Path) -> Written:
    """A family's base, an adapter, and one with DoRA of embedding, head and a linear a layer."""
    source = write_family(name, folder / "base")
    kinds = {"a": {}, "b": {"target_modules": outside(name), "use_dora": True}}
    return source, [
        write_adapter(source, folder / own, rank=8, seed=i, **config)
        for i, (own, config) in enumerate(kinds.items())
    ]


def opened(
    written: Written, dtype: torch.dtype = torch.float32, *, replays: bool = True
) -> TinyWorld:
    """A world with the adapters loaded; without replays every step runs the model's own code."""
    source, adapters = written
    world = TinyWorld(source, dtype=dtype)
    for name, path in zip("ab", adapters, strict=False):
        world.load(name, path)
    if not replays:
        world.runner._replays = None
    return world


def answered(world: TinyWorld, asks: list[Ask]) -> Answers:
    """What all of them are answered, served together."""
    return [(a.tokens, [entry.logprob for entry in a.logprobs]) for a in world.run(asks)]
