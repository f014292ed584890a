"""The second half of the batched delta in Triton, into a finished result or an unfinished one.

`expand` adds to what a base gave. `join` ends a fused NF4 product that left one plane a split of
its sums: they are added here and not in a launch of their own, and a row is rounded once.
"""

from typing import Any

import triton
import triton.language as tl

from fader_adapters.kernels.cuda.lora_kernels import CHUNK
from fader_adapters.kernels.cuda.lora_places import member_of


@triton.jit
def tile_sum(
    arena: tl.tensor,
    z: tl.tensor,
    plane: tl.tensor,
    gamma: tl.tensor,
    b_at: tl.tensor,
    left: tl.tensor,
    scale_at: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    present: tl.tensor,
    n: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    F32: tl.constexpr,
) -> Any:  # noqa: ANN401
    """Σ_e coefficient·(Σ_split z)·B_e of a tile [ROWS, BLOCK_N] float32, entries in ascending
    order, and whether a row used any of them [ROWS].

    z            the first plane's cell of entry `begin`; planes lie `plane` elements apart
    b_at, left, scale_at  of the member at hand, by entry
    present      [ROWS] lanes that hold a row; n [BLOCK_N] the columns of a member of `width`
    The rest as in `expand`. Where B lies is read a turn ahead, so that the compiler copies B itself
    ahead of its use.
    """
    lane = tl.arange(0, ROWS)
    rank = tl.arange(0, CHUNK)
    inside = n < width
    z_at = z + lane[:, None] * CHUNK + rank[None, :]
    b_inside = rank[:, None].to(tl.int64) * width + n[None, :]
    acc = tl.full((ROWS, BLOCK_N), 0, tl.float32)
    touched = tl.full((ROWS,), 0, tl.int32)
    more = begin < end
    coming = tl.multiple_of(tl.load(b_at + begin, mask=more, other=0), 16)
    ranks = tl.load(left + begin, mask=more, other=0)
    for entry in tl.range(begin, end):  # pyright: ignore[reportGeneralTypeIssues]
        b_row, live = coming, rank < ranks
        more = entry + 1 < end
        coming = tl.multiple_of(tl.load(b_at + entry + 1, mask=more, other=0), 16)
        ranks = tl.load(left + entry + 1, mask=more, other=0)
        coefficient = tl.load(gamma + entry * LANES + lane % LANES)
        coefficient = coefficient * tl.load(scale_at + entry)
        used = present & (coefficient != 0)
        wanted = used[:, None]
        here = z_at + (entry - begin) * (ROWS * CHUNK)
        total = tl.load(here, mask=wanted, other=0.0)
        for split in tl.static_range(1, SPLITS):  # pyright: ignore[reportGeneralTypeIssues]
            total += tl.load(here + split * plane, mask=wanted, other=0.0)
        total = tl.where(wanted & live[None, :], total * coefficient[:, None], 0.0)
        b = tl.load(arena + b_row + b_inside, mask=live[:, None] & inside[None, :], other=0.0)
        if F32:
            acc = tl.dot(total, b, acc, input_precision="ieee")
        else:
            acc = tl.dot(total.to(b.dtype), b, acc)
        touched = touched | used.to(tl.int32)
    return acc, touched


@triton.jit(do_not_specialize=["linear", "capacity", "cells"])
def expand(
    y: tl.tensor,
    arena: tl.tensor,
    z: tl.tensor,
    header: tl.tensor,
    tokens: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    cell: tl.tensor,
    gamma: tl.tensor,
    b_at: tl.tensor,
    left: tl.tensor,
    scale_at: tl.tensor,
    width_0: int,
    width_1: int,
    width_2: int,
    width_3: int,
    y_stride: int,
    linear: tl.tensor,
    capacity: tl.tensor,
    cells: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    F32: tl.constexpr,
) -> None:
    """y[token] += Σ_e coefficient·(Σ_split z)·B_e, rounded once; rows without terms stay untouched.

    Grid (Σ ⌈width_i/BLOCK_N⌉, tiles); programs past the tiles in use, or without entries, return.
    y        [T, Σ width_i] row stride y_stride; width_i: columns of member i, 0 when absent
    z        [members, SPLITS, cells, ROWS, 16] float32 from `shrink`, planes summed in order
    gamma    [entries, LANES] float32
    b_at, left, scale_at  [linears, capacity] as `resolve` leaves them
    The rest as in `shrink`.
    """
    tile = tl.program_id(1)
    if tile >= tl.load(header):
        return
    begin = tl.load(first + tile)
    end = tl.load(last + tile)
    if begin == end:
        return
    member, block, column, width = member_of(  # pyright: ignore[reportGeneralTypeIssues]
        tl.program_id(0), width_0, width_1, width_2, width_3, BLOCK_N
    )
    table = (linear + member).to(tl.int64) * capacity
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.load(tokens + tile * ROWS + tl.arange(0, ROWS))
    present = token >= 0
    plane = cells.to(tl.int64) * (ROWS * CHUNK)
    acc, touched = tile_sum(  # pyright: ignore[reportGeneralTypeIssues]
        arena,
        z + member * SPLITS * plane + tl.load(cell + tile).to(tl.int64) * (ROWS * CHUNK),
        plane,
        gamma,
        b_at + table,
        left + table,
        scale_at + table,
        begin,
        end,
        present,
        n,
        width,
        ROWS,
        BLOCK_N,
        SPLITS,
        LANES,
        F32,
    )
    y_at = y + tl.where(present, token, 0).to(tl.int64)[:, None] * y_stride + (column + n)[None, :]
    changed = (touched != 0)[:, None] & (n < width)[None, :]
    base = tl.load(y_at, mask=changed, other=0.0).to(tl.float32)
    tl.store(y_at, base + acc, mask=changed)


@triton.jit(do_not_specialize=["rows", "linear", "capacity", "cells"])
def join(
    out: tl.tensor,
    planes: tl.tensor,
    own: tl.tensor,
    arena: tl.tensor,
    z: tl.tensor,
    header: tl.tensor,
    tokens: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    cell: tl.tensor,
    gamma: tl.tensor,
    b_at: tl.tensor,
    left: tl.tensor,
    scale_at: tl.tensor,
    width_0: int,
    width_1: int,
    width_2: int,
    width_3: int,
    columns: int,
    rows: tl.tensor,
    linear: tl.tensor,
    capacity: tl.tensor,
    cells: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PLANES: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    F32: tl.constexpr,
) -> None:
    """out[t] = ((planes[0, t] + planes[1, t]) + …) + own + Σ_e coefficient·(Σ_split z)·B_e, in
    fp32, rounded once; without the last sum where a row used no entry: the bits of `nf4_sum`.

    Grid (Σ ⌈width_i/BLOCK_N⌉, tiles); programs past the tiles in use return. Every row of a tile
    is written, so the tiles must hold every row of the step; rows of padding are the base's.
    out      [rows, columns] contiguous, columns = Σ width_i
    planes   [PLANES, rows, columns] float32, of nf4_gemm
    own      [columns] the base's own bias; read only when HAS_BIAS
    The rest as in `expand`.
    """
    tile = tl.program_id(1)
    if tile >= tl.load(header):
        return
    member, block, column, width = member_of(  # pyright: ignore[reportGeneralTypeIssues]
        tl.program_id(0), width_0, width_1, width_2, width_3, BLOCK_N
    )
    table = (linear + member).to(tl.int64) * capacity
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.load(tokens + tile * ROWS + tl.arange(0, ROWS))
    present = token >= 0
    place = tl.where(present, token, -2 - token)
    there = (token != -1) & (place < rows)
    at = tl.where(there, place, 0).to(tl.int64)[:, None] * columns + (column + n)[None, :]
    written = there[:, None] & (n < width)[None, :]
    plane = cells.to(tl.int64) * (ROWS * CHUNK)
    acc, touched = tile_sum(  # pyright: ignore[reportGeneralTypeIssues]
        arena,
        z + member * SPLITS * plane + tl.load(cell + tile).to(tl.int64) * (ROWS * CHUNK),
        plane,
        gamma,
        b_at + table,
        left + table,
        scale_at + table,
        tl.load(first + tile),
        tl.load(last + tile),
        present,
        n,
        width,
        ROWS,
        BLOCK_N,
        SPLITS,
        LANES,
        F32,
    )
    part = rows.to(tl.int64) * columns
    base = tl.load(planes + at, mask=written, other=0.0)
    for split in tl.static_range(1, PLANES):  # pyright: ignore[reportGeneralTypeIssues]
        base += tl.load(planes + split * part + at, mask=written, other=0.0)
    if HAS_BIAS:
        held = tl.load(own + column + n, mask=n < width, other=0.0)
        base += held.to(tl.float32)[None, :]
    result = tl.where((touched != 0)[:, None], base + acc, base)
    tl.store(out + at, result, mask=written)
