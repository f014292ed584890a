"""A stack of experts, or a router, on its way into a merged lane: unquantised, as the base's."""

from collections.abc import Callable

import torch

from fader_adapters.changes import Changes
from fader_adapters.expert_layers import Stack
from fader_adapters.kernels.backend import ExpertsWeight, StackBackend
from fader_adapters.kernels.stack_weights import StackWeight
from fader_adapters.merged_site import chunk_rows, loss_of, rounded
from fader_adapters.pauses import Pause
from fader_adapters.weightspace.loss import LinearLoss, joined


class StackWork:
    """Chunks of rows in, expert after expert; one stack out, in the dtype of the base's."""

    def __init__(
        self, stack: Stack, changes: Changes, backend: StackBackend, *, device: torch.device
    ) -> None:
        self._backend = backend
        self._stack = stack
        self._changes = changes
        self._device = device
        self._parts: list[LinearLoss] = []

    def run(self, pause: Pause, told: Callable[[int], None]) -> ExpertsWeight:
        """Merge all rows; `told` hears the weights of each chunk once it is done. Raises
        CheckpointInvalid (NaN or Inf)."""
        spec, base = self._stack.spec, self._stack.weight
        shape = (spec.experts * spec.out_features, spec.in_features)
        flat = torch.empty(shape, dtype=base.dtype, device=self._device)
        step = chunk_rows(spec.in_features)
        for expert in range(spec.experts):
            change = self._changes.of(self._stack.index, expert)
            assert change is not None
            begin = expert * spec.out_features
            for start in range(0, spec.out_features, step):
                stop = min(start + step, spec.out_features)
                given = base.rows(begin + start, begin + stop).cpu()
                wanted = change.of_weight(given, start)
                kept, made = rounded(wanted, flat.dtype, self._device)
                flat[begin + start : begin + stop] = kept
                pause()
                self._parts.append(loss_of(spec.path, change.delta.rank, given, wanted, made))
                pause()
                told(given.numel())
        if spec.role == "router":
            return StackWeight(flat)
        values = flat.view(spec.experts, spec.out_features, spec.in_features)
        stack = StackWeight(values, base.bias)
        return self._backend.pack_stack(stack, pause)

    @property
    def loss(self) -> LinearLoss:
        """What rounding cost, once it is done."""
        return joined(self._parts)
