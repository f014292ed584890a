"""What captured steps have in common: kinds of deltas, what a run and its recording are."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from fader_adapters.kernels.backend import Step
from fader_adapters.kernels.cuda.lora import LoraStep
from fader_server.model.batch import Batch

Run = Callable[[], None]
Record = Callable[[Run], Run]
"""Takes work over fixed buffers; gives what does the same work again on whatever they then hold."""
RunBatch = Callable[[Batch, Step | None], torch.Tensor]

Kind = Literal["base", "deltas", "vectors", "experts", "experts and vectors"]
"""What a step's rows add to the base: nothing, low-rank deltas, those with gains and biases, and
the same with deltas of experts or routers."""
KINDS: tuple[Kind, ...] = ("base", "deltas", "vectors")
EXPERT_KINDS: tuple[Kind, ...] = ("experts", "experts and vectors")

Blank = Callable[[int, Kind], Step | None]
"""A step of a kind that adds nothing to so many rows or tokens, over the buffers of real ones."""


def every_kind(*, stacks: bool) -> Sequence[Kind]:
    """Those that steps of a base have; stacks: whether adapters may change experts or routers."""
    return (*KINDS, *EXPERT_KINDS) if stacks else KINDS


def kind_of(step: LoraStep | None) -> Kind:
    """The kind of graph that runs this step."""
    if step is None:
        return "base"
    if step.stacks:
        return "experts and vectors" if step.vectors else "experts"
    return "vectors" if step.vectors else "deltas"


def vectors(kind: Kind) -> bool:
    """Whether its steps launch what gains and biases need."""
    return kind in ("vectors", "experts and vectors")
