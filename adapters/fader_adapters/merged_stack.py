"""A stack of experts, or a router, on its way into a merged lane: unquantised, as the base's."""

from collections.abc import Callable

import torch

from fader_adapters.changes import Changes
from fader_adapters.expert_layers import Stack
from fader_adapters.kernels.dense import StackWeight
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

    def run(self, pause: Pause, told: Callable[[int], None]) -> StackWeight:
        """Merge all rows; `told` hears the weights of each chunk once it is done. Raises
        CheckpointInvalid (NaN or Inf)."""
        spec, values = self._stack.spec, self._stack.weight.values
        merged = torch.empty(values.shape, dtype=values.dtype, device=self._device)
        flat = merged.view(-1, spec.in_features)
        step = chunk_rows(spec.in_features)
        for expert in range(spec.experts):
            change = self._changes.of(self._stack.index, expert)
            assert change is not None
            begin = expert * spec.out_features
            for start in range(0, spec.out_features, step):
                stop = min(start + step, spec.out_features)
                given = self._stack.weight.rows(begin + start, begin + stop).cpu()
                wanted = change.of_weight(given, start)
                kept, made = rounded(wanted, merged.dtype, self._device)
                flat[begin + start : begin + stop] = kept
                pause()
                self._parts.append(loss_of(spec.path, change.delta.rank, given, wanted, made))
                pause()
                told(given.numel())
        return StackWeight(merged)

    @property
    def loss(self) -> LinearLoss:
        """What rounding cost, once it is done."""
        return joined(self._parts)
