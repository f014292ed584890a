"""Native calls recorded in order, run by one call. Knows no models and no torch operators."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fader_adapters.kernels.native.library import library
from fader_adapters.kernels.native.ops import Kind, Op, Step
from fader_adapters.kernels.native.site import Site
from fader_adapters.kernels.native.workspace import Workspace

WORDS = ctypes.sizeof(Op) // 8


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What differs from one run of a program to the next.

    q_start int32 [R+1], context int32 [R], block_tables int32 [R, columns], slots int64 [T];
    state_from, state_to int32 [R] where the program has calls that keep states.
    """

    q_start: Tensor
    context: Tensor
    block_tables: Tensor
    slots: Tensor
    state_from: Tensor | None = None
    state_to: Tensor | None = None

    def step(self) -> Step:
        """Their addresses; the tensors must outlive it."""
        return Step(
            tokens=self.slots.shape[0],
            rows=self.context.shape[0],
            q_start=self.q_start.data_ptr(),
            context=self.context.data_ptr(),
            block_tables=self.block_tables.data_ptr(),
            max_blocks=self.block_tables.shape[1],
            slots=self.slots.data_ptr(),
            state_from=None if self.state_from is None else self.state_from.data_ptr(),
            state_to=None if self.state_to is None else self.state_to.data_ptr(),
        )


class Program:
    """Native calls in order, as one block of words."""

    def __init__(self, ops: Sequence[Op], workspace: Workspace) -> None:
        self._ops = (Op * len(ops))(*ops)
        self._workspace = workspace
        self._next = ctypes.c_int64()
        self.words = words_of(self._ops)
        """int64 [calls, WORDS]: the calls' fields and addresses, as `Op` lays them out. What is
        written here holds from the next call on."""

    def over(self, sites: Mapping[int, Site]) -> "Program":
        """The same calls over other sites, by the address of each that is to give way."""
        ops = [Op.from_buffer_copy(op) for op in self._ops]
        for op in ops:
            if op.kind == Kind.SITE and op.what in sites:
                op.what = sites[op.what].address
        return Program(ops, self._workspace)

    def __len__(self) -> int:
        return len(self._ops)

    def __call__(self, step: Step, begin: int = 0, end: int | None = None) -> None:
        """Run calls begin..end. Raises: ValueError when a kernel refuses its arguments, a block
        number for example."""
        count = len(self) if end is None else end
        self._next.value = begin
        try:
            self._workspace.call(
                library().fader_run,
                "a recorded step",
                ctypes.addressof(self._ops),
                count,
                ctypes.byref(self._next),
                ctypes.addressof(step),
            )
        except ValueError as error:
            raise ValueError(f"call {self._next.value} of {count}: {error}") from None


def words_of(ops: "ctypes.Array[Op]") -> np.ndarray:
    """int64 [calls, WORDS], the same memory."""
    return np.frombuffer(memoryview(ops).cast("B"), np.int64).reshape(len(ops), WORDS)
