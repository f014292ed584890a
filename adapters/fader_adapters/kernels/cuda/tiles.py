"""Cut a step's rows into tiles that share a list of rank chunks. Integers; never imports torch.

A list is a common supersequence of its rows' terms, so every row meets its own terms in its own
order, whatever else is in the tile. Rows of one token share tiles, sorted by blend; longer rows
(prefill) are cut into tiles of their own that share one list. In a step of one-token rows alone
those without terms have lanes too, behind the others: a kernel may then write every row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fader_adapters.spec import RowTerms, StepTerms

CHUNK = 16
"""Ranks of one entry; the last chunk of an adapter may hold fewer."""

LANES = 16
"""Rows of a decode tile, and coefficients of an entry; lane of a tile's row i is i mod 16."""

_PLAIN = RowTerms(1)

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class Merged(NamedTuple):
    """One place of a merged list: the slot and which of the merged orders use it here."""

    slot: int
    takers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Phase:
    """The tiles of one kind, decode or prefill, of a step.

    tokens  [tiles, rows]  place of each tile row in the step, -1 where the tile is not full, and
                           -2 - place for a row of padding behind the step's own
    first   [tiles]        first entry of the tile's list
    last    [tiles]        one past the last
    cell    [tiles]        first cell of the tile in the scratch: one cell an entry, lists rounded
                           up to whole groups; ascending
    cells   total cells, a multiple of the group
    most    cells that are in the scratch at a time; a tile with more of them is alone there
    """

    tokens: Ints
    first: Ints
    last: Ints
    cell: Ints
    cells: int
    most: int

    @property
    def tiles(self) -> int:
        return len(self.first)

    @cached_property
    def pieces(self) -> tuple["Phase", ...]:
        """What is computed one after the other in one scratch: tiles that follow one another, their
        cells counted anew. One piece where all fit."""
        if self.cells <= self.most:
            return (self,)
        ends = np.append(self.cell[1:], self.cells)
        found, begin = [], 0
        while begin < self.tiles:
            start = self.cell[begin]
            end = max(begin + 1, int(np.searchsorted(ends, start + self.most, side="right")))
            part = slice(begin, end)
            arrays = (self.tokens[part], self.first[part], self.last[part], self.cell[part] - start)
            found.append(Phase(*arrays, int(ends[end - 1] - start), self.most))
            begin = end
        return tuple(found)


@dataclass(frozen=True, eq=False)
class StepTiles:
    """A step's delta work in integers.

    slot, chunk  [entries]         adapter slot and index of 16 of its ranks
    gamma        [entries, LANES]  γ of the tile's rows at this entry, 0 where a row does not use it
    covers       whether every row of the step, padding too, has a lane in a decode tile
    """

    decode: Phase
    prefill: Phase
    slot: Ints
    chunk: Ints
    gamma: Floats
    tokens: int
    covers: bool

    @property
    def entries(self) -> int:
        return len(self.slot)


@dataclass(frozen=True, slots=True)
class TileShape:
    """Rows of a tile, entries that the first kernel takes at a time, cells of a piece."""

    rows: int
    group: int
    most: int


class TileBuilder:
    """Builds StepTiles for fixed tile shapes."""

    def __init__(self, decode: TileShape, prefill: TileShape) -> None:
        assert decode.rows == LANES
        assert prefill.rows % LANES == 0
        self.decode = decode
        self.prefill = prefill

    def build(self, terms: StepTerms, chunks: Sequence[int], *, padded: int = 0) -> StepTiles:
        """Tiles of one step; one that has only rows of one token is padded to `padded` rows.

        `chunks[slot]` is the number of 16-rank chunks of a slot's largest rank, 0 for a slot that
        adapts nothing. Rows whose terms have no chunk get no tile, but for those of a step that has
        only rows of one token.
        """
        singles: list[tuple[int, RowTerms]] = []
        longs: list[tuple[int, RowTerms]] = []
        plain: list[tuple[int, RowTerms]] = []
        start = 0
        for row in terms.rows:
            if row.tokens and any(chunks[slot] for slot, _ in row.terms):
                (singles if row.tokens == 1 else longs).append((start, row))
            else:
                plain.append((start, _PLAIN))
            start += row.tokens
        singles.sort(key=lambda at: (_slots(at[1]), at[0]))
        covers = all(row.tokens == 1 for row in terms.rows)
        if covers and singles:
            singles += plain
            singles += [(-2 - at, _PLAIN) for at in range(start, padded)]
        entries = _Entries(chunks)
        decode = _Cutter(self.decode)
        for tile in _lanes(singles, chunks, self.decode.most):
            decode.add([at for at, _ in tile], entries.add([row for _, row in tile]))
        prefill = _Cutter(self.prefill)
        for at, row in longs:
            span = entries.add([row] * LANES)
            for begin in range(at, at + row.tokens, self.prefill.rows):
                end = min(begin + self.prefill.rows, at + row.tokens)
                prefill.add(range(begin, end), span)
        return StepTiles(
            decode.phase(),
            prefill.phase(),
            np.array(entries.slot, np.int32),
            np.array(entries.chunk, np.int32),
            np.array(entries.gamma, np.float32).reshape(-1, LANES),
            start,
            covers,
        )


def merge(orders: Sequence[Sequence[int]]) -> list[Merged]:
    """A common supersequence of `orders`: the plain union, each slot once, when the orders agree
    with one order of all slots (digest order always does), else with a slot repeated.
    """
    at = [0] * len(orders)
    merged: list[Merged] = []
    while heads := {order[i] for order, i in zip(orders, at, strict=True) if i < len(order)}:
        waiting = {slot for order, i in zip(orders, at, strict=True) for slot in order[i + 1 :]}
        slot = min(heads - waiting or heads)
        takers = tuple(
            which
            for which, order in enumerate(orders)
            if order[at[which] : at[which] + 1] == (slot,)
        )
        for which in takers:
            at[which] += 1
        merged.append(Merged(slot, takers))
    return merged


class _Entries:
    """The lists of all tiles of a step, one after the other."""

    def __init__(self, chunks: Sequence[int]) -> None:
        self.slot: list[int] = []
        self.chunk: list[int] = []
        self.gamma: list[list[float]] = []
        self._chunks = chunks

    def add(self, rows: Sequence[RowTerms]) -> tuple[int, int]:
        """Append the list of a tile with these rows; its first entry and one past its last."""
        first = len(self.slot)
        orders = {_slots(row): None for row in rows}
        which = {order: i for i, order in enumerate(orders)}
        users: list[list[int]] = [[] for _ in orders]
        for lane, row in enumerate(rows):
            users[which[_slots(row)]].append(lane)
        met = [0] * len(rows)
        for slot, takers in merge(tuple(orders)):
            gamma = [0.0] * LANES
            for lane in (lane for taker in takers for lane in users[taker]):
                gamma[lane] = rows[lane].terms[met[lane]][1]
                met[lane] += 1
            for chunk in range(self._chunks[slot]):
                self.slot.append(slot)
                self.chunk.append(chunk)
                self.gamma.append(gamma)
        return first, len(self.slot)


class _Cutter:
    """Collects the tiles of one phase."""

    def __init__(self, shape: TileShape) -> None:
        self._shape = shape
        self._tokens: list[list[int]] = []
        self._spans: list[tuple[int, int]] = []

    def add(self, tokens: Sequence[int], span: tuple[int, int]) -> None:
        self._tokens.append([*tokens, *[-1] * (self._shape.rows - len(tokens))])
        self._spans.append(span)

    def phase(self) -> Phase:
        spans = np.array(self._spans, np.int32).reshape(-1, 2)
        group = self._shape.group
        ends = np.cumsum(-(-(spans[:, 1] - spans[:, 0]) // group) * group, dtype=np.int32)
        return Phase(
            np.array(self._tokens, np.int32).reshape(-1, self._shape.rows),
            spans[:, 0].copy(),
            spans[:, 1].copy(),
            np.concatenate([np.zeros(1, np.int32), ends])[:-1],
            int(ends[-1]) if len(ends) else 0,
            self._shape.most,
        )


def _lanes(
    rows: Sequence[tuple[int, RowTerms]], chunks: Sequence[int], most: int
) -> Iterator[list[tuple[int, RowTerms]]]:
    """Rows of one token in tiles: as many as there are lanes, fewer where their lists together
    would be longer than `most`."""
    tile: list[tuple[int, RowTerms]] = []
    met: set[int] = set()
    for at, row in rows:
        both = met.union(_slots(row))
        full = len(tile) == LANES or sum(chunks[slot] for slot in both) > most
        if tile and full:
            yield tile
            tile, both = [], set(_slots(row))
        tile.append((at, row))
        met = both
    if tile:
        yield tile


def _slots(row: RowTerms) -> tuple[int, ...]:
    return tuple(slot for slot, _ in row.terms)
