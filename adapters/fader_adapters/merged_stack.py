"""A stack of experts, or a router, on its way into a merged lane."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

import torch

from fader_adapters.changes import Changes
from fader_adapters.expert_layers import Stack
from fader_adapters.kernels.backend import ExpertsWeight, Room
from fader_adapters.kernels.dense import filled
from fader_adapters.kernels.stack_weights import StackWeight
from fader_adapters.merged_site import (
    LaneSpec,
    Made,
    Make,
    Part,
    chunk_rows,
    merged_rows,
    packed,
    rounded,
    weight_dtype,
)
from fader_adapters.pauses import Pause
from fader_adapters.weightspace.loss import LinearLoss, joined


class StackWork:
    """Chunks of rows in, expert after expert; one stack out, in the form of the lane's linears."""

    def __init__(
        self,
        stack: Stack,
        changes: Changes,
        spec: LaneSpec,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """dtype: of the activations."""
        self._stack = stack
        self._changes = changes
        self._spec = spec
        self._dtype = dtype
        self._device = device
        self._parts: list[LinearLoss] = []

    def run(self, room: Room, pause: Pause, told: Callable[[int], None]) -> ExpertsWeight:
        """Merge all rows; `told` hears the weights of each chunk once it is done. Raises
        CheckpointInvalid (NaN or Inf)."""
        spec, weight = self._stack.spec, self._stack.weight
        shape = (spec.experts, spec.out_features, spec.in_features)
        dtype = weight_dtype(weight, self._spec.form, self._dtype)
        experts = range(spec.experts)
        if dtype is None:
            make, keep = partial(packed, self._device), self._spec.rounding == "keep"
            parts = (self._rows(expert, make, pause, told, keep=keep) for expert in experts)
            return room.nf4_stack(chain.from_iterable(parts), shape, weight.bias)
        matrices = (self._matrix(expert, dtype, pause, told) for expert in experts)
        if spec.role == "router":
            return StackWeight(next(matrices), weight.bias)
        return room.stack(matrices, shape, weight.bias)

    def _rows(
        self,
        expert: int,
        make: Make[Made],
        pause: Pause,
        told: Callable[[int], None],
        *,
        keep: bool = False,
    ) -> Iterator[Made]:
        """W + Δ of one expert, a chunk at a time."""
        spec, out = self._stack.spec, self._stack.spec.out_features
        change = self._changes.of(self._stack.index, expert)
        step = chunk_rows(spec.in_features, self._device)
        part = Part(self._stack.weight, expert * out, out, spec.in_features, spec.path, step)
        return merged_rows(part, change, make, pause, told, self._parts, keep=keep)

    def _matrix(
        self, expert: int, dtype: torch.dtype, pause: Pause, told: Callable[[int], None]
    ) -> torch.Tensor:
        """W + Δ [out, in] of one expert."""
        shape = (self._stack.spec.out_features, self._stack.spec.in_features)
        return filled(
            self._rows(expert, partial(rounded, dtype, self._device), pause, told), shape
        )  # fmt: skip

    @property
    def loss(self) -> LinearLoss:
        """What rounding cost, once it is done."""
        return joined(self._parts)
