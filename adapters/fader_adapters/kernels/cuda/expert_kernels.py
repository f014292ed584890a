"""The deltas of stacks of experts in Triton: shrink, expand. Knows pairs and offsets, no models.

y[p] += Σ_e γ[t,e]·s[e]·(x[p]·A_{e,n}ᵀ)·B_{e,n} for a pair p of the token t and its expert n, over
the 16-rank entries e of the tile that holds t's row. A program takes a few pairs that follow one
another in the routing; those of one expert that share a list of entries are multiplied together.
A pair's bits depend on its own terms alone: an entry is one dot of 16 ranks, in list order, of 16
lanes however many are filled, and an entry with coefficient 0 adds nothing to the pair.
"""

from typing import Any

import triton
import triton.language as tl

from fader_adapters.kernels.cuda import tiles
from fader_adapters.kernels.cuda.lora_kernels import CHUNK

LANES = tl.constexpr(tiles.LANES)
"""Pairs of a program, and coefficients of an entry; a tile's row i has lane i mod 16 of those."""

SCAN = tl.constexpr(32)
"""Entries that are looked at in one load."""


@triton.jit
def worn_by(
    pair: tl.tensor,
    inside: tl.tensor,
    order: tl.tensor,
    expert: tl.tensor,
    place: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    cell: tl.tensor,
    chosen: tl.tensor,
    places: tl.tensor,
    cells: tl.tensor,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
) -> Any:  # noqa: ANN401
    """Of one pair or several: its row of z, in rows of 16, at the first entry of its list; its lane
    of the coefficients; begin and end of the list, begin −1 where the token has none or an empty
    one; its expert."""
    choice = tl.load(order + pair, mask=inside, other=0).to(tl.int32)
    token = choice // chosen
    at = tl.load(place + token, mask=inside & (token < places), other=0) - 1
    worn = at >= 0
    at = tl.where(worn, at, 0)
    tile = at // TILE
    row = at - tile * TILE
    here = tl.load(cell + tile, mask=worn, other=0)
    to = ((choice - token * chosen).to(tl.int64) * SPLITS * cells + here) * TILE + row
    begin = tl.load(first + tile, mask=worn, other=0)
    end = tl.load(last + tile, mask=worn, other=0)
    begin = tl.where(begin < end, begin, -1)
    which = tl.load(expert + pair, mask=worn, other=0)
    return to, row % LANES, begin, end, which


@triton.jit
def used_of(
    gamma: tl.tensor, left: tl.tensor, base: tl.tensor, end: tl.tensor, lane: tl.tensor
) -> Any:  # noqa: ANN401
    """One bit for each entry from `base` on: whether a row uses it and it has ranks."""
    scan = tl.arange(0, SCAN)
    entry = base + scan
    listed = entry < end
    ranks = tl.load(left + entry, mask=listed, other=0)
    weight = tl.load(gamma + entry * LANES + lane, mask=listed, other=0.0)
    used = (weight != 0) & (ranks > 0)
    return tl.sum(tl.where(used, tl.full((SCAN,), 1, tl.int64) << scan, 0))


@triton.jit
def lowest_of(bits: tl.tensor) -> Any:  # noqa: ANN401
    """The place of the lowest bit that is set: the exponent of its value as a float."""
    alone = (bits & -bits).to(tl.float32)
    return (alone.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit(do_not_specialize=["pairs", "block", "chosen", "places", "linear", "capacity", "cells"])
def expert_shrink(
    x: tl.tensor,
    arena: tl.tensor,
    z: tl.tensor,
    order: tl.tensor,
    expert: tl.tensor,
    place: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    cell: tl.tensor,
    gamma: tl.tensor,
    a_at: tl.tensor,
    left: tl.tensor,
    rank_at: tl.tensor,
    pairs: tl.tensor,
    block: tl.tensor,
    chosen: tl.tensor,
    places: tl.tensor,
    width: int,
    x_stride: int,
    linear: tl.tensor,
    capacity: tl.tensor,
    cells: tl.tensor,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    F32: tl.constexpr,
) -> None:
    """z[turn, split, cell, row, j] = Σ_k x[pair, k]·A[n, j, k] over the split's part of k.

    Grid (⌈pairs/block⌉, SPLITS, parts); a part takes every parts-th entry of a list, parts a power
    of two up to SCAN.
    x        [pairs, width] row stride x_stride, in the order of the routing
    arena    the adapters' weights; of an adapter's stack A is [experts, rank, width]
    z        [chosen, SPLITS, cells, TILE, 16] float32: a token's `turn`-th expert, at its tile's
             cell of the entry and its row there; what no pair uses stays unwritten
    order    [pairs] int64, places in the router's choice [tokens, chosen]; expert [pairs] int64
    place    [places] int32: 1 + tile·TILE + row of a token, 0 without a tile
    first, last, cell: see tiles.Phase; gamma [entries, 16] float32
    a_at, left, rank_at  [linears, capacity] as `resolve` leaves them
    block    pairs of a program, at most 16
    F32      operands as float32, multiplied as such; else x has the arena's dtype
    """
    split = tl.program_id(1)
    table = linear.to(tl.int64) * capacity
    part = (width + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS) * BLOCK_K
    k_begin = split * part
    k_end = tl.minimum(k_begin + part, width)
    leader = tl.program_id(0) * block
    count = tl.minimum(block, pairs - leader)
    pair = leader + tl.arange(0, LANES)
    inside = pair < leader + count
    z += split.to(tl.int64) * cells * (TILE * CHUNK)
    column = tl.arange(0, CHUNK)
    depth = tl.arange(0, BLOCK_K)
    scan = tl.arange(0, SCAN)
    turns = (scan & (tl.num_programs(2) - 1)) == tl.program_id(2)
    share = tl.sum(tl.where(turns, tl.full((SCAN,), 1, tl.int64) << scan, 0))
    start_before, own_before = -1, tl.full((), -1, tl.int64)
    for _ in tl.range(0, count, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
        # read anew, not found among the lanes: the compiler sees that all threads take one way
        _own, row, start, stop, own = worn_by(  # pyright: ignore[reportGeneralTypeIssues]
            leader, leader < pairs,
            order, expert, place, first, last, cell, chosen, places, cells, SPLITS, TILE,
        )  # fmt: skip
        leader += 1
        if TILE > LANES:
            if (start == start_before) & (own == own_before):
                start = -1
            else:
                start_before, own_before = start, own
        if start >= 0:
            to, lane, begin, _end, which = worn_by(  # pyright: ignore[reportGeneralTypeIssues]
                pair, inside,
                order, expert, place, first, last, cell, chosen, places, cells, SPLITS, TILE,
            )  # fmt: skip
            mine = inside & (begin == start) & (which == own)
            if TILE == LANES:  # rows of one token share lists, and have coefficients of their own
                mine = mine & (lane == row)
            for base in tl.range(start, stop, SCAN, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
                bits = used_of(gamma, left + table, base, stop, row) & share
                while bits != 0:
                    entry = base + lowest_of(bits)
                    live = column < tl.load(left + table + entry)
                    a_row = tl.multiple_of(tl.load(a_at + table + entry), 16)
                    a_row += own * tl.load(rank_at + table + entry) * width
                    acc = tl.full((LANES, CHUNK), 0, tl.float32)
                    for k in tl.range(k_begin, k_end, BLOCK_K):  # pyright: ignore[reportGeneralTypeIssues]
                        here = k + depth < k_end
                        a = tl.load(
                            arena + a_row + column[:, None] * width + (k + depth)[None, :],
                            mask=live[:, None] & here[None, :],
                            other=0.0,
                        )
                        rows = tl.load(
                            x + pair.to(tl.int64)[:, None] * x_stride + (k + depth)[None, :],
                            mask=mine[:, None] & here[None, :],
                            other=0.0,
                        )
                        if F32:
                            a, rows = a.to(tl.float32), rows.to(tl.float32)
                            acc = tl.dot(rows, tl.trans(a), acc, input_precision="ieee")
                        else:
                            acc = tl.dot(rows, tl.trans(a), acc)
                    z_at = z + ((to + (entry - start) * TILE) * CHUNK)[:, None] + column[None, :]
                    tl.store(z_at, acc, mask=mine[:, None])
                    bits &= bits - 1


@triton.jit(do_not_specialize=["pairs", "block", "chosen", "places", "linear", "capacity", "cells"])
def expert_expand(
    y: tl.tensor,
    arena: tl.tensor,
    z: tl.tensor,
    order: tl.tensor,
    expert: tl.tensor,
    place: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    cell: tl.tensor,
    gamma: tl.tensor,
    b_at: tl.tensor,
    left: tl.tensor,
    rank_at: tl.tensor,
    scale_at: tl.tensor,
    pairs: tl.tensor,
    block: tl.tensor,
    chosen: tl.tensor,
    places: tl.tensor,
    width: int,
    y_stride: int,
    linear: tl.tensor,
    capacity: tl.tensor,
    cells: tl.tensor,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    F32: tl.constexpr,
) -> None:
    """y[pair] += Σ_e coefficient·(Σ_split z)·B[n], rounded once; pairs without terms stay as they
    are.

    Grid (⌈pairs/block⌉, ⌈width/BLOCK_N⌉).
    y        [pairs, width] row stride y_stride, any float dtype
    arena    the adapters' weights; of an adapter's stack B is [experts, rank, width]
    z        as `expert_shrink` leaves it, planes summed in order
    b_at, left, rank_at, scale_at  [linears, capacity] as `resolve` leaves them
    The rest as in `expert_shrink`.
    """
    table = linear.to(tl.int64) * capacity
    leader = tl.program_id(0) * block
    count = tl.minimum(block, pairs - leader)
    pair = leader + tl.arange(0, LANES)
    inside = pair < leader + count
    rank = tl.arange(0, CHUNK)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = n < width
    acc = tl.full((LANES, BLOCK_N), 0, tl.float32)
    touched = tl.full((LANES,), 0, tl.int32)
    start_before, own_before = -1, tl.full((), -1, tl.int64)
    for _ in tl.range(0, count, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
        # read anew, not found among the lanes: the compiler sees that all threads take one way
        _own, row, start, stop, own = worn_by(  # pyright: ignore[reportGeneralTypeIssues]
            leader, leader < pairs,
            order, expert, place, first, last, cell, chosen, places, cells, SPLITS, TILE,
        )  # fmt: skip
        leader += 1
        if TILE > LANES:
            if (start == start_before) & (own == own_before):
                start = -1
            else:
                start_before, own_before = start, own
        if start >= 0:
            to, lane, begin, _end, which = worn_by(  # pyright: ignore[reportGeneralTypeIssues]
                pair, inside,
                order, expert, place, first, last, cell, chosen, places, cells, SPLITS, TILE,
            )  # fmt: skip
            mine = inside & (begin == start) & (which == own)
            if TILE == LANES:  # rows of one token share lists, and have coefficients of their own
                mine = mine & (lane == row)
            for base in tl.range(start, stop, SCAN, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
                bits = used_of(gamma, left + table, base, stop, row)
                while bits != 0:
                    entry = base + lowest_of(bits)
                    live = rank < tl.load(left + table + entry)
                    weight = tl.load(gamma + entry * LANES + row)
                    coefficient = weight * tl.load(scale_at + table + entry)
                    wanted = mine[:, None] & live[None, :]
                    z_at = z + ((to + (entry - start) * TILE) * CHUNK)[:, None] + rank[None, :]
                    total = tl.load(z_at, mask=wanted, other=0.0)
                    step = cells.to(tl.int64) * (TILE * CHUNK)
                    for split in tl.static_range(1, SPLITS):  # pyright: ignore[reportGeneralTypeIssues]
                        total += tl.load(z_at + split * step, mask=wanted, other=0.0)
                    total = total * coefficient
                    b_row = tl.multiple_of(tl.load(b_at + table + entry), 16)
                    b_row += own * tl.load(rank_at + table + entry) * width
                    b = tl.load(
                        arena + b_row + rank[:, None] * width + n[None, :],
                        mask=live[:, None] & columns[None, :],
                        other=0.0,
                    )
                    if F32:
                        product = tl.dot(total, b.to(tl.float32), input_precision="ieee")
                    else:
                        product = tl.dot(total.to(b.dtype), b)
                    acc = tl.where(mine[:, None], acc + product, acc)
                    touched = touched | mine.to(tl.int32)
                    bits &= bits - 1
    y_at = y + pair.to(tl.int64)[:, None] * y_stride + n[None, :]
    changed = (touched != 0)[:, None] & columns[None, :]
    given = tl.load(y_at, mask=changed, other=0.0).to(tl.float32)
    tl.store(y_at, given + acc, mask=changed)
