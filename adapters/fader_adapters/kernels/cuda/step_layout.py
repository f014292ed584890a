"""Where a step's tiles lie in one block of 32-bit words. Integers only; never imports torch."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fader_adapters.kernels.cuda.tiles import LANES, Ints, Phase, StepTiles

HEADER = 32
"""Words before the first array: in each half the tiles and cells of a phase, decode first."""

ALIGN = 32
"""Every array starts at a multiple of this many words (128 bytes)."""


@dataclass(frozen=True)
class Capacity:
    """What a block has room for; only these numbers may enter a captured graph."""

    decode_tiles: int
    prefill_tiles: int
    entries: int
    decode_cells: int
    prefill_cells: int
    tokens: int = 0
    """Whose places in the tiles are told; 0: nobody asks for those."""

    def holds(self, step: StepTiles) -> bool:
        return (
            step.decode.tiles <= self.decode_tiles
            and step.prefill.tiles <= self.prefill_tiles
            and step.entries <= self.entries
            and step.decode.cells <= self.decode_cells
            and step.prefill.cells <= self.prefill_cells
            and (not self.tokens or step.tokens <= self.tokens)
        )

    def grown(self, step: StepTiles) -> "Capacity":
        """At least doubled wherever `step` does not fit."""
        return Capacity(
            _grow(self.decode_tiles, step.decode.tiles),
            _grow(self.prefill_tiles, step.prefill.tiles),
            _grow(self.entries, step.entries),
            _grow(self.decode_cells, step.decode.cells),
            _grow(self.prefill_cells, step.prefill.cells),
            self.tokens and _grow(self.tokens, step.tokens),
        )


@dataclass(frozen=True, slots=True)
class PhaseAt:
    """Word offsets of one phase's arrays."""

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
    def decode(self) -> PhaseAt:
        return _phase_at(0, HEADER, self.capacity.decode_tiles, LANES)

    @cached_property
    def prefill(self) -> PhaseAt:
        tiles = self.capacity.prefill_tiles
        begin = _phase_end(self.decode, self.capacity)
        return _phase_at(HEADER // 2, begin, tiles, self.prefill_rows)

    @cached_property
    def slot(self) -> int:
        return _phase_end(self.prefill, self.capacity)

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
        block[:HEADER] = 0
        for at, phase in ((self.decode, step.decode), (self.prefill, step.prefill)):
            _put(block, at, phase)
            _put_places(block[at.place : at.place + self.capacity.tokens], phase)
        block[self.slot : self.slot + step.entries] = step.slot
        block[self.chunk : self.chunk + step.entries] = step.chunk
        end = self.gamma + step.entries * LANES
        block[self.gamma : end] = step.gamma.reshape(-1).view(np.int32)
        return end


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


def _phase_end(at: PhaseAt, capacity: Capacity) -> int:
    return at.place + _align(capacity.tokens)


def _align(words: int) -> int:
    return -(-words // ALIGN) * ALIGN


def _grow(have: int, need: int) -> int:
    return have if need <= have else max(need, 2 * have)
