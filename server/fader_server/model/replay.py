"""Runs a recorded forward again, at fixed addresses: native calls in few long runs, torch between.

Knows memory and order; what is recorded, and when, is others' business.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from fader_adapters.kernels.native import Call, Op, Program, StepInputs, StepPlan, Workspace
from fader_server.model.lowering import lower
from fader_server.model.recording import Recording, TorchCall, address, tensors_of

ALIGN = 64


class Arena:
    """Memory that replays share: one runs at a time. Old replays keep what they were given."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> torch.Tensor:
        """uint8 [at least size]"""
        if size > self._memory.numel():
            self._memory = torch.empty(size + size // 2, dtype=torch.uint8)
        return self._memory


class Layout:
    """Offsets for storages that live from a first to a last call; later ones reuse the room."""

    def __init__(self) -> None:
        self.size = 0
        self._free: list[tuple[int, int]] = []

    def take(self, size: int) -> int:
        """Offset of `size` bytes: the smallest gap that fits, else at the end."""
        fits = [(length, start) for start, length in self._free if length >= size]
        if not fits:
            start, self.size = self.size, self.size + size
            return start
        length, start = min(fits)
        self._free.remove((start, length))
        if length > size:
            self._free.append((start + size, length - size))
        return start

    def give(self, start: int, size: int) -> None:
        """Return room; neighbours are joined."""
        merged: list[tuple[int, int]] = []
        for begin, length in sorted([*self._free, (start, size)]):
            if merged and sum(merged[-1]) == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((begin, length))
        self._free = merged


@dataclass(frozen=True, slots=True)
class TorchStep:
    """A torch operator. Its result is copied to where it stood, unless that is an argument."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: list[torch.Tensor]

    def __call__(self) -> None:
        results = tensors_of(self.function(*self.args, **self.kwargs))
        if not self.out:
            return  # it changed an argument
        for place, result in zip(self.out, results, strict=True):
            place.copy_(result)


class Replay:
    """A recording, laid out again. Its inputs' storages are those of the recorded forward."""

    def __init__(
        self, recording: Recording, inputs: StepInputs, *, arena: Arena, scratch: Workspace
    ) -> None:
        self._offsets, size = _lay_out(recording)
        self._memory = arena.take(size)
        self._keep = [t for c in recording.calls for t in _inputs(c, recording)]
        self._parts = [
            part if isinstance(part, TorchStep) else Program(part, inputs, scratch)
            for part in self._grouped(recording)
        ]
        self._kept_calls = [c.keep for c in recording.calls if isinstance(c, Call)]
        self._result = self._moved(recording.result)

    @property
    def native_share(self) -> float:
        """Native calls of all calls."""
        native = sum(len(part) for part in self._parts if isinstance(part, Program))
        return native / (native + sum(isinstance(part, TorchStep) for part in self._parts))

    def __call__(self, plan: StepPlan | None) -> torch.Tensor:
        """The forward's result; it stands until the next replay of any size."""
        for part in self._parts:
            if isinstance(part, Program):
                part(plan)
            else:
                part()
        return self._result

    def _grouped(self, recording: Recording) -> Iterator[TorchStep | list[Op]]:
        run: list[Op] = []
        for call in recording.calls:
            lowered = [call] if isinstance(call, Call) else lower(call)
            if lowered is not None:
                run += [self._placed(one) for one in lowered]
                continue
            if run:
                yield run
            run = []
            assert isinstance(call, TorchCall)
            args, kwargs, out = tree_map(self._moved_leaf, (call.args, call.kwargs, call.out))
            yield TorchStep(call.function, args, kwargs, [] if call.in_place else tensors_of(out))
        if run:
            yield run

    def _placed(self, call: Call) -> Op:
        op = Op.from_buffer_copy(call.op)
        op.x = self._pointer(call.x)
        op.y = None if call.y is None else self._pointer(call.y)
        op.out = None if call.out is None else self._pointer(call.out)
        return op

    def _pointer(self, tensor: torch.Tensor) -> int:
        offset = self._offsets.get(address(tensor))
        if offset is None:
            return tensor.data_ptr()
        return self._memory.data_ptr() + offset + tensor.data_ptr() - address(tensor)

    def _moved_leaf(self, leaf: object) -> object:
        return self._moved(leaf) if isinstance(leaf, torch.Tensor) else leaf

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        offset = self._offsets.get(address(tensor))
        if offset is None:
            return tensor
        start = offset // tensor.itemsize + tensor.storage_offset()
        whole = self._memory[: self._memory.numel() // ALIGN * ALIGN].view(tensor.dtype)
        return whole.as_strided(tensor.shape, tensor.stride(), start)


def _tensors(call: Call | TorchCall) -> list[torch.Tensor]:
    if isinstance(call, TorchCall):
        return call.tensors
    return [t for t in (call.x, call.y, call.out) if t is not None]


def _inputs(call: Call | TorchCall, recording: Recording) -> list[torch.Tensor]:
    return [t for t in _tensors(call) if address(t) not in recording.made]


def _lay_out(recording: Recording) -> tuple[dict[int, int], int]:
    """Offset of every storage the forward made, by its address, and the bytes they need."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, call in enumerate(recording.calls):
        for tensor in _tensors(call):
            first.setdefault(address(tensor), i)
            last[address(tensor)] = i
    last[address(recording.result)] = len(recording.calls)
    starts: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    for storage in recording.made:
        if storage in first:
            starts.setdefault(first[storage], []).append(storage)
            ends.setdefault(last[storage], []).append(storage)
    layout, offsets = Layout(), {}
    for i in range(len(recording.calls)):
        for storage in starts.get(i, ()):
            offsets[storage] = layout.take(_rounded(recording.made[storage]))
        for storage in ends.get(i, ()):
            layout.give(offsets[storage], _rounded(recording.made[storage]))
    return offsets, layout.size


def _rounded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
