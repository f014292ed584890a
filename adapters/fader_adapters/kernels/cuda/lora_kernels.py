"""The batched delta in Triton: resolve, shrink. Knows tiles and offsets, no models.

y[t] += Σ_e γ[t,e]·s[e]·(x[t]·A_eᵀ)·B_e over the 16-rank entries e of the tile that holds row t
(after Punica's shrink and expand; Chen et al. 2023). Every number that changes between steps is
read from device memory. A row's bits depend on its own terms alone: an entry is one dot of 16
ranks, in list order, and an entry with coefficient 0 is never read for the row and adds zeros.
"""

import triton
import triton.language as tl

from fader_adapters.kernels.cuda import tiles
from fader_adapters.kernels.cuda.lora_places import tile_of

CHUNK = tl.constexpr(tiles.CHUNK)


@triton.jit(do_not_specialize=["entries", "linears", "capacity"])
def resolve(
    slot: tl.tensor,
    chunk: tl.tensor,
    a_offset: tl.tensor,
    b_offset: tl.tensor,
    gain_offset: tl.tensor,
    bias_offset: tl.tensor,
    rank: tl.tensor,
    scale: tl.tensor,
    in_features: tl.tensor,
    out_features: tl.tensor,
    a_at: tl.tensor,
    b_at: tl.tensor,
    gain_at: tl.tensor,
    bias_at: tl.tensor,
    left: tl.tensor,
    rank_at: tl.tensor,
    scale_at: tl.tensor,
    entries: int,
    linears: int,
    capacity: int,
    BLOCK: tl.constexpr,
) -> None:
    """Look up every entry at every linear, once a step; grid (⌈entries/BLOCK⌉, linears).

    slot, chunk              [entries] int32
    a_offset … bias_offset   [slots, linears] int64; rank int32; scale float32: the tables
    in_features, out_features [linears] int32, of one expert where a linear is a stack
    a_at, b_at               [linears, capacity] int64, offset in the arena of the entry's first
                             row; of a stack, its first expert's
    gain_at, bias_at         [linears, capacity] int64, the same of a slot's vectors at its first
                             entry; −1 at the others and where there is none
    left                     [linears, capacity] int32, ranks of the entry, 0 to 16
    rank_at                  [linears, capacity] int32, all ranks of its slot there
    scale_at                 [linears, capacity] float32, 0 where left is 0
    """
    linear = tl.program_id(1)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < entries
    row = tl.load(slot + entry, mask=inside, other=0).to(tl.int64) * linears + linear
    begin = tl.load(chunk + entry, mask=inside, other=0) * CHUNK
    whole = tl.load(rank + row, mask=inside, other=0)
    ranks = whole - begin
    ranks = tl.minimum(tl.maximum(ranks, 0), CHUNK)
    live = inside & (ranks > 0)
    a = tl.load(a_offset + row, mask=live, other=0)
    b = tl.load(b_offset + row, mask=live, other=0)
    skip = tl.where(live, begin, 0).to(tl.int64)
    to = linear.to(tl.int64) * capacity + entry
    tl.store(a_at + to, a + skip * tl.load(in_features + linear), mask=inside)
    tl.store(b_at + to, b + skip * tl.load(out_features + linear), mask=inside)
    leads = live & (begin == 0)
    gain = tl.load(gain_offset + row, mask=leads, other=-1)
    bias = tl.load(bias_offset + row, mask=leads, other=-1)
    tl.store(gain_at + to, gain, mask=inside)
    tl.store(bias_at + to, bias, mask=inside)
    tl.store(left + to, ranks, mask=inside)
    tl.store(rank_at + to, whole, mask=inside)
    tl.store(scale_at + to, tl.load(scale + row, mask=live, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["linear", "capacity", "cells"])
def shrink(
    x: tl.tensor,
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
    x_stride: int,
    linear: tl.tensor,
    capacity: tl.tensor,
    cells: tl.tensor,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    F32: tl.constexpr,
) -> None:
    """z[member, split, cell, row, j] = Σ_k x[token, k]·A[j, k] over the split's part of k.

    Grid (programs, SPLITS, members); programs stride over groups of GROUP cells of one tile.
    x        [T, width] row stride x_stride
    arena    the adapters' weights, x's dtype
    z        [members, SPLITS, cells, ROWS, 16] float32; an entry without ranks at this linear
             stays unwritten, as do the rows past the tile's last
    header   [2] int32: tiles, cells in use;  tokens, first, last, cell: see tiles.Phase
    a_at, left  [linears, capacity] as `resolve` leaves them; the site's first linear is `linear`
    F32      float32 operands, multiplied as such
    """
    split = tl.program_id(1)
    member = tl.program_id(2)
    tiles = tl.load(header)
    groups = tl.load(header + 1) // GROUP
    table = (linear + member).to(tl.int64) * capacity
    plane = (member * SPLITS + split).to(tl.int64) * cells
    part = (width + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS) * BLOCK_K
    k_begin = split * part
    k_end = tl.minimum(k_begin + part, width)
    lane = tl.arange(0, ROWS)
    column = tl.arange(0, GROUP * CHUNK)
    depth = tl.arange(0, BLOCK_K)
    for group in tl.range(tl.program_id(0), groups, tl.num_programs(0), num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
        here = group * GROUP
        tile = tile_of(here, cell, tiles)
        at = here - tl.load(cell + tile) + column // CHUNK
        entry = tl.load(first + tile) + at
        listed = entry < tl.load(last + tile)
        ranks = tl.load(left + table + entry, mask=listed, other=0)
        if tl.max(ranks) > 0:
            live = column % CHUNK < ranks
            a_row = tl.load(a_at + table + entry, mask=listed, other=0)
            a_row = tl.multiple_of(a_row, 16) + (column % CHUNK).to(tl.int64) * width
            token = tl.load(tokens + tile * ROWS + lane)
            present = token >= 0
            x_row = x + tl.where(present, token, 0).to(tl.int64)[:, None] * x_stride
            acc = tl.full((ROWS, GROUP * CHUNK), 0, tl.float32)
            for k in tl.range(k_begin, k_end, BLOCK_K):  # pyright: ignore[reportGeneralTypeIssues]
                inside = k + depth < k_end
                a = tl.load(
                    arena + a_row[:, None] + (k + depth)[None, :],
                    mask=live[:, None] & inside[None, :],
                    other=0.0,
                )
                rows = tl.load(
                    x_row + (k + depth)[None, :],
                    mask=present[:, None] & inside[None, :],
                    other=0.0,
                )
                if F32:
                    acc = tl.dot(rows, tl.trans(a), acc, input_precision="ieee")
                else:
                    acc = tl.dot(rows, tl.trans(a), acc)
            to = (plane + here + column // CHUNK) * (ROWS * CHUNK) + column % CHUNK
            filled = present[:, None] & (ranks > 0)[None, :]
            tl.store(z + to[None, :] + lane[:, None] * CHUNK, acc, mask=filled)
