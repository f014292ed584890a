"""What captured steps have in common: kinds of deltas, what a run and its recording are."""

from collections.abc import Callable
from typing import Literal

import torch

from fader_adapters.kernels.backend import Step
from fader_adapters.kernels.cuda.lora import LoraStep
from fader_server.model.batch import Batch

Run = Callable[[], None]
Record = Callable[[Run], Run]
"""Takes work over fixed buffers; gives what does the same work again on whatever they then hold."""
RunBatch = Callable[[Batch, Step | None], torch.Tensor]

Kind = Literal["base", "deltas", "vectors"]
"""What a step's rows add to the base: nothing, low-rank deltas, or those with gains and biases."""
KINDS: tuple[Kind, ...] = ("base", "deltas", "vectors")


def kind_of(step: LoraStep | None) -> Kind:
    """The kind of graph that runs this step."""
    if step is None:
        return "base"
    return "vectors" if step.vectors else "deltas"
