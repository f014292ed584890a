"""The first half of an embedding delta in Triton: columns of A by token. Knows no models."""

import triton
import triton.language as tl

from fader_adapters.kernels.cuda.lora_kernels import CHUNK
from fader_adapters.kernels.cuda.lora_places import tile_of


@triton.jit(do_not_specialize=["linear", "capacity", "cells"])
def pick(
    ids: tl.tensor,
    arena: tl.tensor,
    z: tl.tensor,
    header: tl.tensor,
    tokens: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    cell: tl.tensor,
    a_at: tl.tensor,
    left: tl.tensor,
    width: int,
    linear: tl.tensor,
    capacity: tl.tensor,
    cells: tl.tensor,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """z[cell, row, j] = A[j, ids[token]]: what `shrink` gives for x as one-hot vectors, unsplit.

    Grid (programs,); programs stride over groups of GROUP cells of one tile.
    ids      [T] int64, below width, the vocabulary
    z        [cells, ROWS, 16] float32
    The rest as in `shrink`.
    """
    tiles = tl.load(header)
    groups = tl.load(header + 1) // GROUP
    table = linear.to(tl.int64) * capacity
    lane = tl.arange(0, ROWS)
    column = tl.arange(0, GROUP * CHUNK)
    for group in tl.range(tl.program_id(0), groups, tl.num_programs(0), num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
        here = group * GROUP
        tile = tile_of(here, cell, tiles)
        at = here - tl.load(cell + tile) + column // CHUNK
        entry = tl.load(first + tile) + at
        listed = entry < tl.load(last + tile)
        ranks = tl.load(left + table + entry, mask=listed, other=0)
        live = column % CHUNK < ranks
        a_row = tl.load(a_at + table + entry, mask=listed, other=0)
        a_row += (column % CHUNK).to(tl.int64) * width
        token = tl.load(tokens + tile * ROWS + lane)
        present = token >= 0
        chosen = tl.load(ids + token, mask=present, other=0)
        wanted = present[:, None] & live[None, :]
        picked = tl.load(arena + a_row[None, :] + chosen[:, None], mask=wanted, other=0.0)
        to = (here + column // CHUNK).to(tl.int64) * (ROWS * CHUNK) + column % CHUNK
        filled = present[:, None] & (ranks > 0)[None, :]
        tl.store(z + to[None, :] + lane[:, None] * CHUNK, picked.to(tl.float32), mask=filled)
