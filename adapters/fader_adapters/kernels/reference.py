"""The specification in plain torch: NF4 by decoding, deltas as masked dense products."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from fader_adapters.kernels import nf4
from fader_adapters.kernels.dense import ByRows, DenseLinear, filled
from fader_adapters.kernels.nf4 import Nf4Weight, dense, stack
from fader_adapters.kernels.tables import Tables
from fader_adapters.spec import RowTerms, SiteSpec, StepTerms

if TYPE_CHECKING:
    from fader_adapters.kernels.backend import BaseLinear

CHUNK = 4 << 20
"""Weights decoded at a time: a scratch that stays in cache and below the page-fault cliff."""


LEAST_ROWS = 4
"""torch's fp32 products on CPUs give a row the same bits in any company from this many rows on."""


class DecodedLinear(ByRows):
    """An NF4 weight decoded in chunks of rows at every call; resident at 0.5625 byte a weight."""

    def __init__(self, weight: Nf4Weight, bias: torch.Tensor | None, *, chunk: int = CHUNK) -> None:
        self.weight = weight
        self._rows = max(1, chunk // weight.in_features)
        self.bias = bias
        self.out_features = weight.out_features
        self.in_features = weight.in_features

    @property
    def plain_dtype(self) -> None:
        return None

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._rows >= self.out_features:
            return F.linear(x, dense(self.weight, x.dtype), self.bias)
        y = x.new_empty(x.shape[0], self.out_features)
        for start in range(0, self.out_features, self._rows):
            stop = min(start + self._rows, self.out_features)
            bias = None if self.bias is None else self.bias[start:stop]
            y[:, start:stop] = F.linear(x, dense(self.weight.rows(start, stop), x.dtype), bias)
        return y

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return dense(self.weight, dtype)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return dense(self.weight.rows(start, stop), torch.float32)


class TorchRoom:
    """Merged weights as plain tensors: their memory is torch's."""

    def plain(
        self, rows: Iterable[torch.Tensor], shape: tuple[int, int], bias: torch.Tensor | None
    ) -> DenseLinear:
        return DenseLinear(filled(rows, shape), bias)

    head = plain

    def nf4(
        self, rows: Iterable[Nf4Weight], shape: tuple[int, int], bias: torch.Tensor | None
    ) -> DecodedLinear:
        return DecodedLinear(nf4.filled(rows, shape), bias)


@dataclass(frozen=True)
class Tile:
    """Consecutive tokens of a step that are computed against one list of slots."""

    start: int
    stop: int
    slots: tuple[int, ...]
    gamma: torch.Tensor
    """[tokens, slots] float32, 0 where a token does not use the slot."""


@dataclass(frozen=True)
class Operands:
    """What several slots have at one linear, in fp32; A and B stacked along the rank."""

    a: torch.Tensor
    """[R, in]"""
    b: torch.Tensor
    """[R, out]"""
    owner: torch.Tensor
    """[R] index into the tile's slots."""
    scale: torch.Tensor
    """[R]"""
    vectors: tuple[tuple[int, torch.Tensor | None, torch.Tensor | None], ...]
    """(slot's place, gain [out], scale · bias [out]) of every slot that has one of them."""


class ReferenceStep:
    """Tiles of one step and the operands gathered for them so far."""

    def __init__(self, tiles: list[Tile], gather: "Gather") -> None:
        self.tiles = tiles
        self.gather = gather


class Gather:
    """Stacked operands per (slots, linear), kept while the tables and the slots in use stay."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.generation = tables.generation
        self._kept: dict[tuple[tuple[int, ...], int], Operands | None] = {}

    def keep_only(self, used: set[tuple[int, ...]]) -> None:
        self._kept = {key: value for key, value in self._kept.items() if key[0] in used}

    def operands(
        self, slots: tuple[int, ...], linear: int, shape: tuple[int, int]
    ) -> Operands | None:
        """None when no slot touches this linear. shape is (in, out)."""
        key = (slots, linear)
        if key not in self._kept:
            self._kept[key] = self._stack(slots, linear, *shape)
        return self._kept[key]

    def _stack(self, slots: tuple[int, ...], linear: int, width: int, out: int) -> Operands | None:
        t = self.tables
        parts_a, parts_b, ranks, vectors = [], [], [], []
        for place, slot in enumerate(slots):
            rank = int(t.rank[slot, linear])
            ranks.append(rank)
            if rank:
                a, b = int(t.a_offset[slot, linear]), int(t.b_offset[slot, linear])
                parts_a.append(t.arena[a : a + rank * width].view(rank, width))
                parts_b.append(t.arena[b : b + rank * out].view(rank, out))
                gain, bias = self._vectors(slot, linear, out)
                if gain is not None or bias is not None:
                    vectors.append((place, gain, bias))
        if not parts_a:
            return None
        device = t.arena.device
        repeats = torch.tensor(ranks)
        owner = torch.repeat_interleave(torch.arange(len(slots)), repeats)
        return Operands(
            torch.cat(parts_a).float(),
            torch.cat(parts_b).float(),
            owner.to(device),
            t.scale[list(slots), linear][owner].to(device),
            tuple(vectors),
        )

    def _vectors(
        self, slot: int, linear: int, out: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gain and scale · bias [out] of one slot, None where it has none."""
        t = self.tables
        gain, bias = int(t.gain_offset[slot, linear]), int(t.bias_offset[slot, linear])
        return (
            None if gain < 0 else t.arena[gain : gain + out].float(),
            None if bias < 0 else t.arena[bias : bias + out].float() * t.scale[slot, linear].item(),
        )


class ReferenceBackend:
    """Runs anywhere torch runs. Every other backend is tested against it."""

    name = "reference"
    least_rows = LEAST_ROWS
    apart = False

    def __init__(self) -> None:
        self._gather: Gather | None = None

    def linear(self, weights: Sequence[Nf4Weight], bias: torch.Tensor | None) -> DecodedLinear:
        return DecodedLinear(stack(weights), bias)

    def room(self) -> TorchRoom:
        return TorchRoom()

    def prepare(self, tables: Tables, terms: StepTerms) -> ReferenceStep | None:
        if terms.idle:
            return None
        tiles = [tile for tile in _tiles(terms, tables.arena.device) if tile.slots]
        gather = self._gather
        if gather is None or gather.tables is not tables or gather.generation != tables.generation:
            gather = self._gather = Gather(tables)
        gather.keep_only({tile.slots for tile in tiles})
        return ReferenceStep(tiles, gather)

    def bind(self, site: SiteSpec, base: "BaseLinear") -> "ReferenceSite":
        return ReferenceSite(site, base)

    def bind_lookup(self, site: SiteSpec) -> "ReferenceLookup":
        return ReferenceLookup(site)


class ReferenceSite:
    """One site: the base, then each member's delta into its columns."""

    def __init__(self, site: SiteSpec, base: "BaseLinear") -> None:
        self.site = site
        self.base = base

    def __call__(self, x: torch.Tensor, step: object | None) -> torch.Tensor:
        y = self.base(x)
        if step is None:
            return y
        assert isinstance(step, ReferenceStep)
        for tile in step.tiles:
            rows = _padded(x[tile.start : tile.stop].float())
            column = 0
            for linear, out in zip(self.site.linears, self.site.out_features, strict=True):
                parts = step.gather.operands(tile.slots, linear, (self.site.in_features, out))
                if parts is not None:
                    part = y[tile.start : tile.stop, column : column + out]
                    own = None if self.base.bias is None else self.base.bias[column : column + out]
                    part.copy_(_add_delta(part, rows @ parts.a.T, parts, tile.gamma, own))
                column += out
        return y


class ReferenceLookup:
    """An embedding's delta: the columns of A that the tokens name, times B."""

    def __init__(self, site: SiteSpec) -> None:
        self.site = site

    def __call__(self, y: torch.Tensor, ids: torch.Tensor, step: object | None) -> None:
        if step is None:
            return
        assert isinstance(step, ReferenceStep)
        (linear,), (out,) = self.site.linears, self.site.out_features
        for tile in step.tiles:
            parts = step.gather.operands(tile.slots, linear, (self.site.in_features, out))
            if parts is not None:
                part = y[tile.start : tile.stop]
                z = _padded(parts.a[:, ids[tile.start : tile.stop]].T)
                part.copy_(_add_delta(part, z, parts, tile.gamma, None))


def _padded(rows: torch.Tensor) -> torch.Tensor:
    """At least as many rows as give each the same bits in any company."""
    return F.pad(rows, (0, 0, 0, max(0, LEAST_ROWS - rows.shape[0])))


def _add_delta(
    y: torch.Tensor,
    z: torch.Tensor,
    parts: Operands,
    gamma: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """y + G∘(y − bias) + (z ∘ γ·s)·B + γ·s·biasB, z = x·Aᵀ, G = Σ γ·gain, in fp32, rounded once.

    A zero coefficient selects, it never multiplies. `bias` is the base's own.
    """
    tokens = y.shape[0]
    coefficient = _padded(gamma)[:, parts.owner] * parts.scale  # [tokens, R]
    used = coefficient != 0
    z = torch.where(used, z * coefficient, 0.0)
    total = y.float() + (z @ parts.b)[:tokens]
    for place, gain, shift in parts.vectors:
        own = gamma[:, place : place + 1]
        if gain is not None:
            plain = y.float() if bias is None else y.float() - bias.float()
            total += torch.where(own != 0, own * gain * plain, 0.0)
        if shift is not None:
            total += torch.where(own != 0, own * shift, 0.0)
    touched = used.any(dim=1, keepdim=True)[:tokens]
    return torch.where(touched, total.to(y.dtype), y)


def _tiles(terms: StepTerms, device: torch.device) -> list[Tile]:
    """Each row of many tokens is a tile of its own; consecutive single-token rows share one."""
    tiles: list[Tile] = []
    start = 0
    shared: list[RowTerms] = []
    for row in (*terms.rows, RowTerms(0)):
        if row.tokens == 1:
            shared.append(row)
            continue
        if shared:
            tiles.append(_tile(start, shared, device))
            start += len(shared)
            shared = []
        if row.tokens:
            tiles.append(_tile(start, [row], device))
            start += row.tokens
    return tiles


def _tile(start: int, rows: Sequence[RowTerms], device: torch.device) -> Tile:
    slots = tuple(sorted({slot for row in rows for slot, _ in row.terms}))
    place = {slot: i for i, slot in enumerate(slots)}
    gamma = [[0.0] * len(slots) for _ in rows]
    for weights, row in zip(gamma, rows, strict=True):
        for slot, value in row.terms:
            weights[place[slot]] = value
    table = torch.tensor(gamma, dtype=torch.float32, device=device).reshape(len(rows), len(slots))
    tokens = sum(row.tokens for row in rows)
    return Tile(
        start, start + tokens, slots, table if tokens == len(rows) else table.expand(tokens, -1)
    )
