"""Where a program of the delta kernels stands: tile, member, columns. Knows no weights."""

from typing import Any

import triton
import triton.language as tl

SCAN = tl.constexpr(64)
"""Tiles that are looked at in one load."""


@triton.jit
def tile_of(here: tl.tensor, cell: tl.tensor, tiles: tl.tensor) -> Any:  # noqa: ANN401
    """The tile that cell `here` lies in; cell [tiles] int32: each tile's first, ascending."""
    scan = tl.arange(0, SCAN)
    tile = -1
    for base in tl.range(0, tiles, SCAN, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
        begins = tl.load(cell + base + scan, mask=base + scan < tiles, other=2147483647)
        tile += tl.sum((begins <= here).to(tl.int32))
    return tile


@triton.jit
def member_of(
    block: tl.tensor,
    width_0: tl.tensor,
    width_1: tl.tensor,
    width_2: tl.tensor,
    width_3: tl.tensor,
    BLOCK_N: tl.constexpr,
) -> Any:  # noqa: ANN401
    """(member, block within it, its first column, its width) of one of all members' blocks."""
    member = 0
    column = 0
    width = width_0
    blocks = (width_0 + BLOCK_N - 1) // BLOCK_N
    if block >= blocks:
        block -= blocks
        member = 1
        column = width_0
        width = width_1
        blocks = (width_1 + BLOCK_N - 1) // BLOCK_N
        if block >= blocks:
            block -= blocks
            member = 2
            column += width_1
            width = width_2
            blocks = (width_2 + BLOCK_N - 1) // BLOCK_N
            if block >= blocks:
                block -= blocks
                member = 3
                column += width_2
                width = width_3
    return member, block, column, width
