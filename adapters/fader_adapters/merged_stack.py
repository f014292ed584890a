"""A stack of experts, or a router, on its way into a merged lane: unquantised, as the base's."""

from collections.abc import Callable

import torch

from fader_adapters.changes import Changes
from fader_adapters.expert_layers import Stack
from fader_adapters.kernels.backend import ExpertsWeight, Room
from fader_adapters.kernels.stack_weights import StackWeight
from fader_adapters.merged_site import chunk_rows, loss_of, rounded
from fader_adapters.pauses import Pause
from fader_adapters.weightspace.loss import LinearLoss, joined


class StackWork:
    """Chunks of rows in, expert after expert; one stack out, in the dtype of the base's."""

    def __init__(self, stack: Stack, changes: Changes, *, device: torch.device) -> None:
        self._stack = stack
        self._changes = changes
        self._device = device
        self._parts: list[LinearLoss] = []

    def run(self, room: Room, pause: Pause, told: Callable[[int], None]) -> ExpertsWeight:
        """Merge all rows; `told` hears the weights of each chunk once it is done. Raises
        CheckpointInvalid (NaN or Inf)."""
        spec, bias = self._stack.spec, self._stack.weight.bias
        matrices = (self._matrix(expert, pause, told) for expert in range(spec.experts))
        if spec.role == "router":
            return StackWeight(next(matrices), bias)
        return room.stack(matrices, (spec.experts, spec.out_features, spec.in_features), bias)

    def _matrix(self, expert: int, pause: Pause, told: Callable[[int], None]) -> torch.Tensor:
        """W + Δ [out, in] of one expert."""
        spec, base = self._stack.spec, self._stack.weight
        change = self._changes.of(self._stack.index, expert)
        assert change is not None
        out, width = spec.out_features, spec.in_features
        made = torch.empty(out, width, dtype=base.dtype, device=self._device)
        step = chunk_rows(width)
        for start in range(0, out, step):
            stop = min(start + step, out)
            given = base.rows(expert * out + start, expert * out + stop).cpu()
            wanted = change.of_weight(given, start)
            made[start:stop], values = rounded(wanted, made.dtype, self._device)
            pause()
            self._parts.append(loss_of(spec.path, change.delta.rank, given, wanted, values))
            pause()
            told(given.numel())
        return made

    @property
    def loss(self) -> LinearLoss:
        """What rounding cost, once it is done."""
        return joined(self._parts)
