"""The product of experts in NF4 tiles, in Triton. Knows pairs sorted by expert; chooses nothing."""

# ruff: noqa: ANN001, ANN201  (a kernel's docstring gives the types of its arguments)

import triton
import triton.language as tl

from fader_adapters.kernels.cuda.nf4_kernels import HALF, TILE, block_sums

SCAN = tl.constexpr(128)
"""Experts that are looked at in one load."""


@triton.jit
def pairs_of(tile, ends_ptr, experts, BM: tl.constexpr):
    """Expert of the `tile`-th tile, where each expert's pairs are cut into tiles of BM; its first
    pair; one past the last pair of that expert. Expert ≥ experts: there are fewer tiles.

    ends  [experts] int32: where each expert's pairs end
    """
    lane = tl.arange(0, SCAN)
    expert, begin, skipped, tiles = 0, 0, 0, 0
    for base in tl.range(0, experts, SCAN, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
        at = base + lane
        inside = at < experts
        end = tl.load(ends_ptr + at, mask=inside, other=0)
        pairs = end - tl.load(ends_ptr + at - 1, mask=inside & (at > 0), other=0)
        count = (pairs + BM - 1) // BM
        before = inside & (tiles + tl.cumsum(count, 0) <= tile)
        expert += tl.sum(before.to(tl.int32))
        begin += tl.sum(tl.where(before, pairs, 0))
        skipped += tl.sum(tl.where(before, count, 0))
        tiles += tl.sum(count)
    end = tl.load(ends_ptr + expert, mask=expert < experts, other=0)
    return expert, begin + (tile - skipped) * BM, end


@triton.jit(do_not_specialize=["experts", "blocks"])
def nf4_experts(
    x_ptr,
    codes_ptr,
    scales_ptr,
    bias_ptr,
    table_ptr,
    ends_ptr,
    out_ptr,
    experts,
    n,
    blocks,
    x_stride,
    w0,
    w1,
    w2,
    w3,
    w4,
    w5,
    w6,
    w7,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[p, i] = Σ_b scale[e, i, b] · Σ_{j in b} code[e, i, j] · x[p, j] (+ bias[e, i]), e = e(p).

    x       [pairs, 64·blocks] sorted by expert, bf16, any float dtype when EXACT; rows `x_stride`
            apart, columns adjacent
    codes   uint8 and scales fp32 in the layout of Nf4Tiles, a stack of `experts` matrices of n rows
    bias    [experts, n] or unused
    table   [16] fp32 codes, read only when EXACT
    ends    [experts] int32: where each expert's pairs end
    out     [pairs, n] any float dtype, rounded once
    w0..w7  the words of nf4_codes.table_words, read unless EXACT
    grid    (⌈n/BN⌉, tiles), as many tiles as there can be: each expert's pairs begin a tile of BM
            of their own, programs past the last one end at once
    Summed as `block_sums` says, over all blocks: a pair's bits depend on its own row of x and its
    expert alone, not on BM, BN or where it lies in its tile. Rows of a tile past the expert's last
    pair read that one and are not stored. Columns of a tile follow one another in the grid, then
    the tiles of one expert, so that its matrix comes from the cache where there are several.
    """
    expert, first, stop = pairs_of(  # pyright: ignore[reportGeneralTypeIssues]
        tl.program_id(1), ends_ptr, experts, BM
    )
    if expert >= experts:
        return
    column = tl.program_id(0) * BN
    row = column % TILE + tl.arange(0, BN)
    pair = first + tl.arange(0, BM)
    byte = tl.arange(0, HALF)
    matrix = expert.to(tl.int64) * ((n + TILE - 1) // TILE)
    start = (matrix + column // TILE) * blocks * TILE
    line = tl.minimum(pair, stop - 1).to(tl.int64) * x_stride
    acc = block_sums(  # pyright: ignore[reportGeneralTypeIssues]
        x_ptr + line[:, None] + byte[None, :],
        codes_ptr + start * HALF + (row[:, None] * HALF + byte[None, :]),
        scales_ptr + start + row,
        table_ptr, blocks, w0, w1, w2, w3, w4, w5, w6, w7, BM, BN, EXACT, STAGES,
    )  # fmt: skip
    out_column = column + tl.arange(0, BN)
    if HAS_BIAS:
        bias_at = bias_ptr + expert.to(tl.int64) * n + out_column
        bias = tl.load(bias_at, mask=out_column < n, other=0.0)
        acc += bias.to(tl.float32)[:, None]
    out_at = out_ptr + pair.to(tl.int64)[None, :] * n + out_column[:, None]
    tl.store(out_at, acc, mask=(pair < stop)[None, :] & (out_column < n)[:, None])
