"""How large the buffers of a step's deltas are, by what they are for. Integers and a holder."""

from dataclasses import dataclass

from fader_adapters.kernels.cuda.lora_buffers import StepBuffers
from fader_adapters.kernels.cuda.lora_step import LoraStep
from fader_adapters.kernels.cuda.lora_tables import DECODE_TILE, PREFILL_TILE
from fader_adapters.kernels.cuda.step_layout import Capacity
from fader_adapters.kernels.cuda.tiles import LANES
from fader_adapters.spec import RowTerms

LEAST = Capacity(4, 32, 256, 256, 256, 256)
"""Of those that grow, at first."""

PROMPT_ROWS = 8
"""Prompts of a step that may be captured: each may leave a tile half full, and a grid has programs
for every tile there might be."""

PROMPT_ENTRIES = 256
"""16-rank chunks of such a step."""


@dataclass(slots=True)
class Room:
    """Buffers and what they hold now."""

    buffers: StepBuffers
    rows: tuple[RowTerms, ...] | None = None
    step: LoraStep | None = None


def decode_capacity(rows: int, entries: int) -> Capacity:
    """Room for a decode step of so many rows and 16-rank chunks, however they fall into tiles."""
    tiles = -(-rows // LANES)
    return Capacity(tiles, 0, entries, _cells(entries, tiles, DECODE_TILE.group), 0, rows)


def prompt_capacity(tokens: int) -> Capacity:
    """Room for a step of so many tokens of prompts."""
    cells = _cells(PROMPT_ENTRIES, prompt_tiles(tokens), PREFILL_TILE.group)
    return Capacity(0, prompt_tiles(tokens), PROMPT_ENTRIES, 0, cells, tokens)


def prompt_tiles(tokens: int) -> int:
    """Tiles of so many tokens in up to PROMPT_ROWS prompts, at most."""
    return tokens // PREFILL_TILE.rows + PROMPT_ROWS


def _cells(entries: int, lists: int, group: int) -> int:
    """Cells of so many entries in so many lists, each rounded up to whole groups, at most."""
    return -(-(entries + lists * (group - 1)) // group) * group
