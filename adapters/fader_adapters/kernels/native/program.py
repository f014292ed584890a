"""Native calls recorded in order, run by one call. Knows no models and no torch operators."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fader_adapters.kernels.native.library import library
from fader_adapters.kernels.native.ops import Op, Step
from fader_adapters.kernels.native.step import StepPlan
from fader_adapters.kernels.native.workspace import Workspace


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What differs from one run of a program to the next, at fixed addresses.

    q_start int32 [R+1], context int32 [R], block_tables int32 [R, columns], slots int64 [T].
    """

    q_start: Tensor
    context: Tensor
    block_tables: Tensor
    slots: Tensor


class Program:
    """A run of native calls whose tensors stay where they are. Call it once a step."""

    def __init__(self, ops: Sequence[Op], inputs: StepInputs, workspace: Workspace) -> None:
        self._ops = (Op * len(ops))(*ops)
        self._keep = inputs
        self._workspace = workspace
        self._step = Step(
            tokens=inputs.slots.shape[0],
            rows=inputs.context.shape[0],
            q_start=inputs.q_start.data_ptr(),
            context=inputs.context.data_ptr(),
            block_tables=inputs.block_tables.data_ptr(),
            max_blocks=inputs.block_tables.shape[1],
            slots=inputs.slots.data_ptr(),
        )
        self._next = ctypes.c_int64()

    def __len__(self) -> int:
        return len(self._ops)

    def __call__(self, plan: StepPlan | None) -> None:
        """Raises: ValueError when a kernel refuses its arguments, a block number for example."""
        self._step.plan = None if plan is None else plan.pointer
        self._next.value = 0
        try:
            self._workspace.call(
                library().fader_run,
                "a recorded step",
                ctypes.addressof(self._ops),
                len(self._ops),
                ctypes.byref(self._next),
                ctypes.addressof(self._step),
            )
        except ValueError as error:
            raise ValueError(f"call {self._next.value} of {len(self._ops)}: {error}") from None
