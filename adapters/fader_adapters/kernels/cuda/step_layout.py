"""Where a step's tiles lie in one block of 32-bit words. Integers only; never imports torch."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fader_adapters.kernels.cuda.tiles import LANES, Ints, Phase, StepTiles

HEADER = 16
"""Words for the tiles and cells of a piece; those of all pieces come first, decode's before."""

ALIGN = 32
"""Every array starts at a multiple of this many words (128 bytes)."""


@dataclass(frozen=True)
class Capacity:
    """What a block has room for; only these numbers may enter a captured graph.

    Tiles and cells are those of one piece of a phase.
    """

    decode_tiles: int
    prefill_tiles: int
    entries: int
    decode_cells: int
    prefill_cells: int
    tokens: int = 0
    """Whose places in the tiles are told; 0: nobody asks for those."""
    decode_pieces: int = 1
    prefill_pieces: int = 1

    def holds(self, step: StepTiles) -> bool:
        decode, prefill = _most(step.decode), _most(step.prefill)
        return (
            decode.tiles <= self.decode_tiles
            and prefill.tiles <= self.prefill_tiles
            and step.entries <= self.entries
            and decode.cells <= self.decode_cells
            and prefill.cells <= self.prefill_cells
            and (not self.tokens or step.tokens <= self.tokens)
            and decode.pieces <= self.decode_pieces
            and prefill.pieces <= self.prefill_pieces
        )

    def grown(self, step: StepTiles) -> "Capacity":
        """At least doubled wherever `step` does not fit; cells up to those of a piece."""
        decode, prefill = _most(step.decode), _most(step.prefill)
        return Capacity(
            _grow(self.decode_tiles, decode.tiles),
            _grow(self.prefill_tiles, prefill.tiles),
            _grow(self.entries, step.entries),
            _grow(self.decode_cells, decode.cells, step.decode.most),
            _grow(self.prefill_cells, prefill.cells, step.prefill.most),
            self.tokens and _grow(self.tokens, step.tokens),
            _grow(self.decode_pieces, decode.pieces),
            _grow(self.prefill_pieces, prefill.pieces),
        )


class _Most(NamedTuple):
    """What the pieces of a phase need: tiles and cells of the largest, and how many there are."""

    tiles: int
    cells: int
    pieces: int


def _most(phase: Phase) -> _Most:
    pieces = phase.pieces
    tiles, cells = (piece.tiles for piece in pieces), (piece.cells for piece in pieces)
    return _Most(max(tiles), max(cells), len(pieces))


@dataclass(frozen=True, slots=True)
class PhaseAt:
    """Word offsets of the arrays of one piece of a phase."""

    header: int
    tokens: int
    first: int
    last: int
    cell: int
    place: int
    """1 + tile · rows of a tile + row of each token, 0 for one without a tile."""


@dataclass(frozen=True)
class StepLayout:
    """Word offsets of every array, a function of the capacity and the rows of a prefill tile."""

    capacity: Capacity
    prefill_rows: int

    @cached_property
    def decode(self) -> tuple[PhaseAt, ...]:
        """Of every piece there may be."""
        held = self.capacity
        begin = _align(HEADER * (held.decode_pieces + held.prefill_pieces))
        return self._pieces(held.decode_pieces, 0, begin, held.decode_tiles, LANES)

    @cached_property
    def prefill(self) -> tuple[PhaseAt, ...]:
        held = self.capacity
        begin = self._end(self.decode[-1])
        rows = self.prefill_rows
        return self._pieces(
            held.prefill_pieces, held.decode_pieces, begin, held.prefill_tiles, rows
        )

    @cached_property
    def slot(self) -> int:
        return self._end(self.prefill[-1])

    @cached_property
    def chunk(self) -> int:
        return self.slot + _align(self.capacity.entries)

    @cached_property
    def gamma(self) -> int:
        return self.chunk + _align(self.capacity.entries)

    @cached_property
    def words(self) -> int:
        return self.gamma + self.capacity.entries * LANES

    def pack(self, step: StepTiles, block: Ints) -> int:
        """Write a step that the capacity holds into block [words]; the words used."""
        assert self.capacity.holds(step)
        block[: self.decode[0].tokens] = 0
        for places, phase in ((self.decode, step.decode), (self.prefill, step.prefill)):
            for at, piece in zip(places, phase.pieces, strict=False):
                _put(block, at, piece)
                _put_places(block[at.place : at.place + self.capacity.tokens], piece)
        block[self.slot : self.slot + step.entries] = step.slot
        block[self.chunk : self.chunk + step.entries] = step.chunk
        end = self.gamma + step.entries * LANES
        block[self.gamma : end] = step.gamma.reshape(-1).view(np.int32)
        return end

    def _pieces(
        self, count: int, before: int, begin: int, tiles: int, rows: int
    ) -> tuple[PhaseAt, ...]:
        found = []
        for place in range(before, before + count):
            found.append(_phase_at(place * HEADER, begin, tiles, rows))
            begin = self._end(found[-1])
        return tuple(found)

    def _end(self, at: PhaseAt) -> int:
        return at.place + _align(self.capacity.tokens)


def _put(block: Ints, at: PhaseAt, phase: Phase) -> None:
    block[at.header : at.header + 2] = phase.tiles, phase.cells
    block[at.tokens : at.tokens + phase.tokens.size] = phase.tokens.reshape(-1)
    for offset, values in ((at.first, phase.first), (at.last, phase.last), (at.cell, phase.cell)):
        block[offset : offset + phase.tiles] = values


def _put_places(block: Ints, phase: Phase) -> None:
    block[:] = 0
    if len(block):
        tokens = phase.tokens.reshape(-1)
        (here,) = np.nonzero(tokens >= 0)
        block[tokens[here]] = here + 1


def _phase_at(header: int, begin: int, tiles: int, rows: int) -> PhaseAt:
    first = begin + _align(tiles * rows)
    step = _align(tiles)
    return PhaseAt(header, begin, first, first + step, first + 2 * step, first + 3 * step)


def _align(words: int) -> int:
    return -(-words // ALIGN) * ALIGN


def _grow(have: int, need: int, most: int | None = None) -> int:
    if need <= have:
        return have
    return max(need, 2 * have if most is None else min(2 * have, most))
