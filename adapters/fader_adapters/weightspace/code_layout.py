"""How one weight lies in a checkpoint as codes, and its reading. Knows keys, shapes and files."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from fader_adapters.errors import CheckpointInvalid
from fader_adapters.weightspace.decoding import MX_BLOCK, Grid, microscaled, scaled, unpacked
from fader_adapters.weightspace.tensors import Checkpoint, Stored

_PIECE = 1 << 22
"""Codes that are read and decoded at a time, in whole rows."""
_SCALES = (torch.float32, torch.bfloat16, torch.float16)


class Coded(Protocol):
    """One weight. Everything but the values was checked when this was made."""

    @property
    def name(self) -> str:
        """The key that the weight would have by itself."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        ...

    @property
    def key(self) -> str:
        """Of its codes."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """Every key that is spent on it."""
        ...

    def read(self, files: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
        """Its numbers. Raises CheckpointInvalid, with the key."""
        ...


@dataclass(frozen=True, slots=True)
class ScaledWeight:
    """Codes [out, width], or [experts, out, width], and a scale a block."""

    name: str
    key: str
    shape: tuple[int, ...]
    grid: Grid
    scales: str
    in_fp32: bool
    """What is computed in; else the dtype of the scales."""
    zeros: str | None = None
    column_groups: str | None = None
    bits: int | None = None
    """Of numbers that lie packed in words of 32; None: each is one of the tensor's."""
    dropped: tuple[str, ...] = ()
    """Keys of what is no part of a weight: scales of activations."""

    @property
    def parts(self) -> tuple[str, ...]:
        given = (self.key, self.scales, self.zeros, self.column_groups, *self.dropped)
        return tuple(key for key in given if key is not None)

    def read(self, files: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
        """`shape` in `dtype`, contiguous. Raises CheckpointInvalid."""
        *experts, out, width = self.shape
        made = torch.empty(self.shape, dtype=dtype)
        scales = finite(files, self.scales)
        scales = scales.to(torch.float32) if self.in_fp32 else scales
        grids = scales.reshape(-1, *self.grid.shape(out, width))
        row = files.tensors[self.key].shape[-1]
        rows = _rows_a_piece(row, out, alone=not experts)
        codes = (part.view(-1, row) for part in files.chunks(self.key, elements=rows * row))
        if self.bits is not None:
            codes = (unpacked(words, self.bits, width) for words in codes)
        zeros, groups = self._zeros(files, out, width), None
        if self.column_groups is not None:
            groups = groups_of(files, self.column_groups, self.grid.shape(out, width)[1])
        for grid, target in zip(grids, made.view(-1, out, width), strict=True):
            own = itertools.islice(codes, math.ceil(out / rows))
            scaled(own, grid, self.grid, target, zeros=zeros, column_groups=groups)
        return made

    def _zeros(self, files: Checkpoint, out: int, width: int) -> torch.Tensor | None:
        if self.zeros is None:
            return None
        stored = files.read(self.zeros)
        if self.bits is not None and stored.dtype == torch.int32:
            return unpacked(stored.T, self.bits, out).T
        return stored.reshape(self.grid.shape(out, width))


@dataclass(frozen=True, slots=True)
class MicroscaledStack:
    """Experts' matrices in MXFP4, each [out, width] there and [width, out] in the model."""

    name: str
    key: str
    """uint8 [experts, out, width / 32, 16]"""
    scales: str
    """uint8 [experts, out, width / 32]"""
    shape: tuple[int, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        return self.key, self.scales

    def read(self, files: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
        """`shape` in `dtype`, contiguous. Raises CheckpointInvalid."""
        _, width, out = self.shape
        made = torch.empty(self.shape, dtype=dtype)
        rows = _rows_a_piece(width // 2, out, alone=False)
        codes = files.chunks(self.key, elements=rows * width // 2)
        scales = files.chunks(self.scales, elements=rows * width // MX_BLOCK)
        for place, (blocks, exponents) in enumerate(zip(codes, scales, strict=True)):
            try:
                numbers = microscaled(blocks.view(rows, -1), exponents.view(rows, -1), dtype)
            except ValueError as error:
                raise CheckpointInvalid(f"{self.scales!r}: {error}") from None
            expert, at = divmod(place * rows, out)
            made[expert, :, at : at + rows] = numbers.T
        return made


def _rows_a_piece(row: int, out: int, *, alone: bool) -> int:
    """How many rows of so many codes to read at a time. Pieces end where each matrix of `out` rows
    does; one that is alone may end with a smaller one."""
    most = max(1, _PIECE // row)
    if alone or out <= most:
        return min(out, most)
    return next((rows for rows in range(most, most // 4, -1) if out % rows == 0), out)


def pieces(files: Checkpoint, key: str) -> Iterator[torch.Tensor]:
    """The rows [n, row] of one matrix, a few at a time."""
    row = files.tensors[key].shape[-1]
    rows = max(1, _PIECE // row)
    return (part.view(-1, row) for part in files.chunks(key, elements=rows * row))


def finite(files: Checkpoint, key: str) -> torch.Tensor:
    """Scales. Raises CheckpointInvalid where one is no number."""
    scales = files.read(key)
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointInvalid(f"{key!r} has NaN or infinite scales")
    return scales


def groups_of(files: Checkpoint, key: str, count: int) -> torch.Tensor:
    """Which of `count` groups each column is in. Raises CheckpointInvalid."""
    groups = files.read(key).long()
    if int(groups.min()) < 0 or int(groups.max()) >= count:
        raise CheckpointInvalid(f"{key!r} names groups beyond the {count}")
    return groups


def beside(files: Checkpoint, key: str, part: str) -> Stored:
    """What has to lie beside the codes under `key`. Raises CheckpointInvalid."""
    found = files.tensors.get(part)
    if found is None:
        raise CheckpointInvalid(f"{key!r} holds codes, and {part!r}, which they need, is missing")
    return found


def scales_beside(files: Checkpoint, key: str, part: str) -> tuple[int, ...]:
    """The shape of the scales that have to lie there. Raises CheckpointInvalid."""
    found = beside(files, key, part)
    if found.dtype not in _SCALES:
        raise CheckpointInvalid(f"{part!r} is {found.dtype}, expected scales in floating point")
    return found.shape


def two_sizes(told: object) -> Grid | None:
    """Blocks of [rows, columns], as configs tell them; None where that is nothing of the kind."""
    sizes = told if isinstance(told, list | tuple) else ()
    sound = len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)
    return Grid(*sizes) if sound else None
