"""Runs a recorded forward again, at fixed addresses: native calls in few long runs, torch between.

Knows memory and order; what is recorded, and when, is others' business.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from fader_adapters.kernels.native import Call, Op, Program, Site, StepInputs, StepPlan, Workspace
from fader_server.model.lowering import lowered
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
        numbers, used = numbered(recording.calls, recording.made)
        sizes = [rounded(recording.made[storage]) for storage in numbers]
        size, starts = laid_out(used, sizes, numbers.get(address(recording.result)))
        self._offsets = dict(zip(numbers, starts, strict=True))
        self._memory = arena.take(size)
        self._inputs, self._step = inputs, inputs.step()
        self._keep = [t for c in recording.calls for t in _inputs(c, recording)]
        self._parts = [
            part if isinstance(part, TorchStep) else Program(part, scratch)
            for part in self._grouped(recording)
        ]
        self._sites: Mapping[int, Site] = {}  # kept: calls name them by address
        self._kept_calls = [c.keep for c in recording.calls if isinstance(c, Call)]
        self._result = self._moved(recording.result)

    def over(self, sites: Mapping[int, Site]) -> "Replay":
        """The same over other sites, by the address of each that is to give way."""
        other = copy.copy(self)
        other._parts = [p.over(sites) if isinstance(p, Program) else p for p in self._parts]
        other._sites = sites
        return other

    @property
    def inherited(self) -> bool:
        """Whether it is another one over other sites."""
        return bool(self._sites)

    def __call__(self, plan: StepPlan | None) -> torch.Tensor:
        """The forward's result; it stands until the next replay of any size."""
        self._step.plan = None if plan is None else plan.pointer
        for part in self._parts:
            if isinstance(part, Program):
                part(self._step)
            else:
                part()
        return self._result

    def _grouped(self, recording: Recording) -> Iterator[TorchStep | list[Op]]:
        run: list[Op] = []
        for call in lowered(recording):
            if isinstance(call, Call):
                run.append(self._placed(call))
                continue
            if run:
                yield run
            run = []
            args, kwargs, out = tree_map(self._moved_leaf, (call.args, call.kwargs, call.out))
            yield TorchStep(call.function, args, kwargs, [] if call.in_place else tensors_of(out))
        if run:
            yield run

    def _placed(self, call: Call) -> Op:
        op = Op.from_buffer_copy(call.op)
        op.x = self._pointer(call.x)
        op.y = None if call.y is None else self._pointer(call.y)
        op.z = None if call.z is None else self._pointer(call.z)
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


def _inputs(call: Call | TorchCall, recording: Recording) -> list[torch.Tensor]:
    return [t for t in call.tensors if address(t) not in recording.made]


def numbered(
    calls: Iterable[Call | TorchCall], made: Collection[int]
) -> tuple[dict[int, int], list[list[int]]]:
    """Numbers of the storages in `made`, by address, as they appear; those that each call uses."""
    numbers: dict[int, int] = {}
    used = [
        [numbers.setdefault(address(t), len(numbers)) for t in call.tensors if address(t) in made]
        for call in calls
    ]
    return numbers, used


def laid_out(
    used: Sequence[Sequence[int]], sizes: Sequence[int], result: int | None
) -> tuple[int, list[int]]:
    """Bytes in all, and where each storage begins; `used` names those of each call in order."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, storages in enumerate(used):
        for storage in storages:
            first.setdefault(storage, i)
            last[storage] = i
    if result is not None:
        last[result] = len(used)
    layout, starts = Layout(), [0] * len(sizes)
    for i, storages in enumerate(used):
        for storage in dict.fromkeys(storages):
            if first[storage] == i:
                starts[storage] = layout.take(sizes[storage])
        for storage in dict.fromkeys(storages):
            if last[storage] == i:
                layout.give(starts[storage], sizes[storage])
    return layout.size, starts


def rounded(size: int) -> int:
    """Bytes that a storage takes."""
    return -(-size // ALIGN) * ALIGN
