"""A forward recorded at three sizes, run again at any: what depends on the size does so linearly.

Sizes are the tokens of a step and the logits that are wanted of it. Knows memory and order; what
is recorded, and when, is others' business.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from fader_adapters.kernels.native import (
    Call,
    Kind,
    Op,
    Program,
    Site,
    StepInputs,
    StepPlan,
    Workspace,
    words_of,
)
from fader_server.model.lowering import lowered
from fader_server.model.recording import Recording, TorchCall, Unrepeatable, address
from fader_server.model.replay import Arena, TorchStep, laid_out, numbered, rounded
from fader_server.model.sizes import Linear, Size


def _word(name: str) -> int:
    return getattr(Op, name).offset // 8


_ADDRESSES = tuple(map(_word, ("x", "y", "z", "out")))
_KINDS = tuple(map(_word, ("kind", "dtype", "what", "bias", "scalar")))
_ROWS = _word("size")
_WHAT = _word("what")
STEP = Size(64, 8)
"""What room grows by."""


class _Told:
    """One recording: its calls, and the storages it made numbered as they appear."""

    def __init__(self, recording: Recording) -> None:
        self.calls = list(lowered(recording))
        self.result = recording.result
        """Its storage is one that a call used."""
        self._numbers, self.used = numbered(self.calls, recording.made)
        """used: the storages of each call."""
        self.bytes = [recording.made[storage] for storage in self._numbers]

    def number(self, tensor: torch.Tensor) -> int | None:
        """Of its storage; None for one that was there before."""
        return self._numbers.get(address(tensor))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies at any size."""

    tensor: torch.Tensor
    storage: int | None
    numbers: Linear
    """Its offset, shape and strides, in elements."""

    def at(self, size: Size, memory: torch.Tensor, starts: np.ndarray) -> torch.Tensor:
        if self.storage is None and self.numbers.fixed:
            return self.tensor
        offset, *rest = self.numbers.of(size).tolist()
        shape, strides = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        if self.storage is None:
            return self.tensor.as_strided(shape, strides, offset)
        start = int(starts[self.storage]) // self.tensor.itemsize
        return memory.view(self.tensor.dtype).as_strided(shape, strides, start + offset)


@dataclass(frozen=True, slots=True)
class _TorchPlaces:
    """A torch operator with its tensors' places, and numbers that depend on the size."""

    call: TorchCall
    leaves: tuple[object, ...]
    spec: Any

    def at(self, size: Size, memory: torch.Tensor, starts: np.ndarray) -> TorchStep:
        leaves = [_leaf(x, size, memory, starts) for x in self.leaves]
        args, kwargs, out = tree_unflatten(leaves, self.spec)
        outs = [t for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)]
        return TorchStep(self.call.function, args, kwargs, [] if self.call.in_place else outs)


def _leaf(leaf: object, size: Size, memory: torch.Tensor, starts: np.ndarray) -> object:
    if isinstance(leaf, _Place):
        return leaf.at(size, memory, starts)
    return int(leaf.of(size)) if isinstance(leaf, Linear) else leaf


class ShapedReplay:
    """Recordings at SIZES, as one forward of any size."""

    def __init__(
        self, recordings: Sequence[Recording], *, arena: Arena, scratch: Workspace
    ) -> None:
        """Raises Unrepeatable where they are not one forward."""
        told = [_Told(recording) for recording in recordings]
        first = told[0]
        self._keep = first.calls, first.result
        self._used = first.used
        self._bytes = Linear.through([one.bytes for one in told])
        self._result = _place([one.result for one in told], told)
        self._arena, self._room = arena, Size(0, 0)
        self._memory, self._starts = torch.empty(0, dtype=torch.uint8), np.zeros(0, np.int64)
        natives: list[tuple[Call, ...]] = []
        self._parts: list[tuple[int, int] | _TorchPlaces] = []
        """Native calls by first and end, and torch operators between them."""
        for same in _side_by_side(told):
            if isinstance(same, _TorchPlaces):
                self._parts.append(same)
                continue
            natives.append(same)
            end = len(natives)
            last = self._parts.pop() if self._parts else None
            if isinstance(last, tuple):
                self._parts.append((last[0], end))
            else:
                self._parts += [*([last] if last else []), (end - 1, end)]
        self._words, self._storages = _words(natives, told)
        self._program = Program([calls[0].op for calls in natives], scratch)
        self._sites: Mapping[int, Site] = {}  # kept: calls name them by address

    def over(self, sites: Mapping[int, Site]) -> "ShapedReplay":
        """The same over other sites, by the address of each that is to give way."""
        other = copy.copy(self)
        other._program = self._program.over(sites)
        other._words = self._words._replace(at=self._words.at.copy())
        other._words.at[:, _WHAT] = other._program.words[:, _WHAT]
        other._sites = sites
        return other

    def __call__(self, size: Size, inputs: StepInputs, plan: StepPlan | None) -> torch.Tensor:
        """The forward's result, valid until the next replay of anything in the same arena."""
        if any(own > room for own, room in zip(size, self._room, strict=True)):
            self._make_room(size)
        words = self._program.words
        words[:] = self._words.of(size)
        calls, places, storages = self._storages
        words[calls, places] += self._memory.data_ptr() + self._starts[storages]
        step = inputs.step()
        step.plan = None if plan is None else plan.pointer
        for part in self._parts:
            if isinstance(part, tuple):
                self._program(step, *part)
            else:
                part.at(size, self._memory, self._starts)()
        return self._result.at(size, self._memory, self._starts)

    def _make_room(self, size: Size) -> None:
        """Lay storages out for sizes up to this one and more."""
        self._room = Size(
            *(
                max(room, -(-own // least) * least)
                for own, room, least in zip(size, self._room, STEP, strict=True)
            )
        )
        sizes = [rounded(own) for own in self._bytes.of(self._room).tolist()]
        total, starts = laid_out(self._used, sizes, self._result.storage)
        self._starts = np.array(starts, np.int64)
        self._memory = self._arena.take(total)[:total]


def _side_by_side(told: Sequence[_Told]) -> Iterator[tuple[Call, ...] | _TorchPlaces]:
    """Each call as every recording tells it. Raises Unrepeatable."""
    if len({(len(one.calls), len(one.bytes)) for one in told}) > 1:
        raise Unrepeatable("other operators run at other sizes")
    for same in zip(*(one.calls for one in told), strict=True):
        natives = tuple(call for call in same if isinstance(call, Call))
        others = [call for call in same if isinstance(call, TorchCall)]
        if natives and others:
            raise Unrepeatable("other operators run at other sizes")
        yield natives or _torch_places(others, told)


def _torch_places(same: Sequence[TorchCall], told: Sequence[_Told]) -> _TorchPlaces:
    flat = [tree_flatten((call.args, call.kwargs, call.out)) for call in same]
    spec = flat[0][1]
    if any(call.function != same[0].function for call in same) or any(s != spec for _, s in flat):
        raise Unrepeatable("other operators run at other sizes")
    leaves: list[object] = []
    for own in zip(*(found for found, _ in flat), strict=True):
        if all(isinstance(leaf, torch.Tensor) for leaf in own):
            leaves.append(_place(own, told))
        elif all(type(leaf) is int for leaf in own) and len(set(own)) > 1:
            leaves.append(Linear.through(own))
        elif any(isinstance(leaf, torch.Tensor) or leaf != own[0] for leaf in own):
            raise Unrepeatable(f"{same[0].function} takes other values at other sizes")
        else:
            leaves.append(own[0])
    return _TorchPlaces(same[0], tuple(leaves), spec)


def _place(same: Sequence[torch.Tensor], told: Sequence[_Told]) -> _Place:
    storage = _storage(same, told)
    if len({tensor.dtype for tensor in same}) > 1:
        raise Unrepeatable("a tensor is of another type at other sizes")
    numbers = [(t.storage_offset(), *t.shape, *t.stride()) for t in same]
    return _Place(same[0], storage, Linear.through(numbers))


def _storage(same: Sequence[torch.Tensor], told: Sequence[_Told]) -> int | None:
    """The number of one storage in all recordings; None where it is one that was there before."""
    numbers = {one.number(tensor) for one, tensor in zip(told, same, strict=True)}
    if len(numbers) > 1 or (numbers == {None} and len({address(t) for t in same}) > 1):
        raise Unrepeatable("tensors come from other places at other sizes")
    return numbers.pop()


def _words(
    natives: Sequence[tuple[Call, ...]], told: Sequence[_Told]
) -> tuple[Linear, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The calls' words without the arena's part of addresses; calls, words and storages of those.

    Raises Unrepeatable. Rows of the output layer are not the step's tokens: it is base only.
    """
    ops = [(Op * len(natives))(*(calls[i].op for calls in natives)) for i in range(len(told))]
    seen = [words_of(own).copy() for own in ops]
    storages: list[tuple[int, int, int]] = []
    for at, calls in enumerate(natives):
        for word, tensors in zip(
            _ADDRESSES, zip(*((c.x, c.y, c.z, c.out) for c in calls), strict=True), strict=True
        ):
            there = [t for t in tensors if t is not None]
            if not there:
                continue
            if len(there) < len(told):
                raise Unrepeatable("a call has other arguments at other sizes")
            storage = _storage(there, told)
            for own, tensor in zip(seen, there, strict=True):
                base = 0 if storage is None else address(tensor)
                own[at, word] = tensor.data_ptr() - base
            if storage is not None:
                storages.append((at, word, storage))
    words = Linear.through(seen)
    if words.per_token[:, _KINDS].any() or words.per_logit[:, _KINDS].any():
        raise Unrepeatable("a call is of another kind at other sizes")
    for at, calls in enumerate(natives):
        if calls[0].op.kind == Kind.SITE and words.per_logit[at, _ROWS]:
            ops[0][at].map = 1
            words.at[at, 0] = words_of(ops[0])[at, 0]
    calls, places, numbers = np.array(storages, np.int64).reshape(-1, 3).T
    return words, (calls, places, numbers)
