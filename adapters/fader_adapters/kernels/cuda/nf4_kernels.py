"""Triton kernels over NF4 tiles: split-K product, its sum, dequantisation. Chooses nothing."""

# ruff: noqa: ANN001, ANN201, ANN202  (a kernel's docstring gives the types of its arguments)

import triton
import triton.language as tl

from fader_adapters.kernels.cuda import nf4_tiles
from fader_adapters.kernels.cuda.nf4_codes import LOOKUP, LOOKUP_CONSTRAINTS

_LOOKUP = tl.constexpr(LOOKUP)
_CONSTRAINTS = tl.constexpr(LOOKUP_CONSTRAINTS)
TILE = tl.constexpr(nf4_tiles.TILE)
HALF = tl.constexpr(nf4_tiles.HALF)


@triton.jit
def _gather(nibbles, table):
    flat = tl.reshape(nibbles.to(tl.int32), (nibbles.numel,))
    return tl.reshape(tl.gather(table, flat, 0), nibbles.shape)


@triton.jit
def block_sums(
    x_at,
    code_at,
    scale_at,
    table_ptr,
    blocks,
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
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """[BN, BM] fp32: Σ_b scale[i, b] · Σ_{j in b} code[i, j] · x[m, j] over `blocks` blocks.

    x_at, code_at, scale_at  [BM, 32], [BN, 32] and [BN] places of the first block, Nf4Tiles' layout
    A block's products are summed first and scaled then, in fp32, blocks in ascending order: an
    element's bits depend on its own row of x and of W and on the blocks, not on BM or BN. W is the
    first operand, so that few rows of x are the narrow side of the matrix instruction; its codes
    are looked up in registers and reach that instruction through shared memory, by a store and a
    load for each eight. EXACT takes the codes from `table` in x's own dtype, in Triton's
    interpreter too; else x is bf16 and they come from the words. STAGES is given to the loop
    itself: without it the scales, which feed no product, would not be pipelined.
    """
    if EXACT:
        table = tl.load(table_ptr + tl.arange(0, 16))
    acc = tl.zeros((BN, BM), tl.float32)
    for _ in tl.range(0, blocks, num_stages=STAGES):
        packed = tl.load(code_at, eviction_policy="evict_first")
        x_high = tl.load(x_at)
        x_low = tl.load(x_at + HALF)
        scale = tl.load(scale_at, eviction_policy="evict_first")
        if EXACT:
            high = _gather(packed >> 4, table).to(x_high.dtype)
            low = _gather(packed & 15, table).to(x_low.dtype)
            part = tl.dot(high, tl.trans(x_high), input_precision="ieee")
            part = tl.dot(low, tl.trans(x_low), part, input_precision="ieee")
        else:
            high, low = tl.inline_asm_elementwise(
                _LOOKUP,
                _CONSTRAINTS,
                [packed, w0, w1, w2, w3, w4, w5, w6, w7],
                dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=4,
            )
            part = tl.dot(low, tl.trans(x_low), tl.dot(high, tl.trans(x_high)))
        acc += part * scale[:, None]
        code_at += TILE * HALF
        scale_at += TILE
        x_at += 2 * HALF
    return acc


@triton.jit(do_not_specialize=["rows", "blocks", "split_blocks"])
def nf4_gemm(
    x_ptr,
    codes_ptr,
    scales_ptr,
    bias_ptr,
    table_ptr,
    out_ptr,
    rows,
    n,
    blocks,
    split_blocks,
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
    """out[s, m, i] = Σ_{b in split s} scale[i, b] · Σ_{j in b} code[i, j] · x[m, j]  (+ bias[i])

    x       [rows, 64·blocks] bf16, fp32 when EXACT; rows `x_stride` apart, columns adjacent
    codes   uint8 and scales fp32 in the layout of Nf4Tiles
    bias    [n] added to every split, so given only when there is one
    table   [16] fp32 codes, read only when EXACT
    out     [splits, rows, n], fp32 planes or the result in its own dtype
    w0..w7  the words of nf4_codes.table_words, read unless EXACT
    grid    (⌈n/BN⌉, splits, ⌈rows/BM⌉); split s covers blocks s·split_blocks and on
    Summed as `block_sums` says: an element's bits depend on split_blocks, not on rows, BM or BN.
    Rows of x past `rows` read the last one and are not stored. EXACT runs in fp32 with fp32 codes,
    and in Triton's interpreter.
    """
    column = tl.program_id(0) * BN
    split = tl.program_id(1)
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, blocks)
    row = column % TILE + tl.arange(0, BN)
    token = tl.program_id(2) * BM + tl.arange(0, BM)
    byte = tl.arange(0, HALF)
    start = ((column // TILE).to(tl.int64) * blocks + first) * TILE
    code_at = codes_ptr + start * HALF + (row[:, None] * HALF + byte[None, :])
    scale_at = scales_ptr + start + row
    line = tl.minimum(token, rows - 1).to(tl.int64) * x_stride + first * 2 * HALF
    x_at = x_ptr + line[:, None] + byte[None, :]
    acc = block_sums(  # pyright: ignore[reportGeneralTypeIssues]
        x_at, code_at, scale_at, table_ptr, last - first,
        w0, w1, w2, w3, w4, w5, w6, w7, BM, BN, EXACT, STAGES,
    )  # fmt: skip
    out_column = column + tl.arange(0, BN)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + out_column, mask=out_column < n, other=0.0)
        acc += bias.to(tl.float32)[:, None]
    out_at = out_ptr + (split.to(tl.int64) * rows + token)[None, :] * n + out_column[:, None]
    tl.store(out_at, acc, mask=(token < rows)[None, :] & (out_column < n)[:, None])


@triton.jit(do_not_specialize=["rows"])
def nf4_sum(
    planes_ptr,
    bias_ptr,
    out_ptr,
    rows,
    n,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[m, i] = ((planes[0, m, i] + planes[1, m, i]) + …) + bias[i], in fp32, rounded once.

    planes  [SPLITS, rows, n] fp32
    bias    [n] or unused
    out     [rows, n]
    grid    (⌈n/BLOCK⌉, rows)
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    at = tl.program_id(1).to(tl.int64) * n + column
    plane = rows.to(tl.int64) * n
    total = tl.load(planes_ptr + at, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(planes_ptr + split * plane + at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total, mask=inside)


@triton.jit(do_not_specialize=["blocks", "first_tile"])
def nf4_dense(codes_ptr, scales_ptr, table_ptr, out_ptr, n, blocks, first_tile, ROWS: tl.constexpr):
    """out[i − 128·first_tile, j] = code[i, j] · scale[i, j // 64], in fp32, rounded once.

    codes, scales  the layout of Nf4Tiles
    table          [16] fp32 codes
    out            [rows, 64·blocks] any float dtype
    grid           (tiles · 128 / ROWS, blocks); only rows i < n are written
    """
    line = tl.program_id(0) * ROWS
    block = tl.program_id(1)
    row = line % TILE + tl.arange(0, ROWS)
    byte = tl.arange(0, HALF)
    start = ((first_tile + line // TILE).to(tl.int64) * blocks + block) * TILE
    packed = tl.load(codes_ptr + start * HALF + (row[:, None] * HALF + byte[None, :]))
    scale = tl.load(scales_ptr + start + row)[:, None]
    table = tl.load(table_ptr + tl.arange(0, 16))
    out_row = line + tl.arange(0, ROWS)
    at = out_row.to(tl.int64)[:, None] * (blocks * 2 * HALF) + block * 2 * HALF + byte[None, :]
    inside = (first_tile * TILE + out_row < n)[:, None]
    tl.store(out_ptr + at, _gather(packed >> 4, table) * scale, mask=inside)
    tl.store(out_ptr + at + HALF, _gather(packed & 15, table) * scale, mask=inside)
