"""The deltas of stacks of experts in Triton: shrink, expand. Knows pairs and offsets, no models.

y[p] += Σ_e γ[t,e]·s[e]·(x[p]·A_{e,n}ᵀ)·B_{e,n} for a pair p of the token t and its expert n, over
the 16-rank entries e of the tile that holds t's row. A program takes a few pairs that follow one
another in the routing; those of one expert that share a list of entries are multiplied together.
A pair's bits depend on its own terms alone: an entry is one dot of 16 ranks, in list order, of 16
lanes however many are filled, and an entry with coefficient 0 adds nothing to the pair.
"""
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from fader_adapters.kernels.cuda.expert_groups import LANES, SCAN, led, led_by, lowest_of, used_of
from fader_adapters.kernels.cuda.lora_kernels import CHUNK


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
    lists = (order, expert, place, first, last, cell, chosen, places, cells)
    start_before, own_before = -1, tl.full((), -1, tl.int64)
    for _ in tl.range(0, count, num_stages=1):
        row, start, stop, own, start_before, own_before = led_by(
            leader, leader < pairs, start_before, own_before, lists, SPLITS, TILE
        )
        leader += 1
        if start >= 0:
            to, mine = led(pair, inside, row, start, own, lists, SPLITS, TILE)
            for base in tl.range(start, stop, SCAN, num_stages=1):
                bits = used_of(gamma, left + table, base, stop, row) & share
                while bits != 0:
                    entry = base + lowest_of(bits)
                    live = column < tl.load(left + table + entry)
                    a_row = tl.multiple_of(tl.load(a_at + table + entry), 16)
                    a_row += own * tl.load(rank_at + table + entry) * width
                    acc = tl.full((LANES, CHUNK), 0, tl.float32)
                    for k in tl.range(k_begin, k_end, BLOCK_K):
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
    lists = (order, expert, place, first, last, cell, chosen, places, cells)
    start_before, own_before = -1, tl.full((), -1, tl.int64)
    for _ in tl.range(0, count, num_stages=1):
        row, start, stop, own, start_before, own_before = led_by(
            leader, leader < pairs, start_before, own_before, lists, SPLITS, TILE
        )
        leader += 1
        if start >= 0:
            to, mine = led(pair, inside, row, start, own, lists, SPLITS, TILE)
            for base in tl.range(start, stop, SCAN, num_stages=1):
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
                    for split in tl.static_range(1, SPLITS):
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
