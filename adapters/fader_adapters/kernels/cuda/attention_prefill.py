"""Attention of rows of more than one query. A query's bits depend on its own row alone, not on the
chunk it came in: key blocks start at multiples of BLOCK_N and are visited in one order.
"""
# ruff: noqa: ANN001, ANN201, ANN202
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from fader_adapters.kernels.cuda.attention_tile import normalised, visit, with_sink


@triton.jit
def _row_of_tile(cu_tokens, rows, tile, TILE_Q: tl.constexpr):
    """The last row r with cu_tokens[r] // TILE_Q + r <= tile: room for every row's tiles, found
    without a list.
    """
    found = 0
    for at in tl.range(0, rows, 128):
        r = at + tl.arange(0, 128)
        begins = tl.load(cu_tokens + r, mask=r < rows, other=0)
        found += tl.sum(((begins // TILE_Q + r <= tile) & (r < rows)).to(tl.int32), 0)
    return found - 1


@triton.jit(do_not_specialize=["table_stride", "rows", "window"])
def prefill_kernel(
    q,
    k_cache,
    v_cache,
    sinks,
    out,
    cu_tokens,
    contexts,
    tables,
    table_stride,
    rows,
    q_token_stride,
    q_head_stride,
    window,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Rows of more than one query: a tile is BLOCK_M // GROUP queries of one row times the heads
    that share a KV head.

    Grid (T // (BLOCK_M // GROUP) + rows, kv_heads); arguments as in decode_kernel.
    """
    TILE_Q: tl.constexpr = BLOCK_M // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    kv_head = tl.program_id(1)
    row = _row_of_tile(cu_tokens, rows, tile, TILE_Q)
    begin = tl.load(cu_tokens + row)
    count = tl.load(cu_tokens + row + 1) - begin
    first = (tile - begin // TILE_Q - row) * TILE_Q
    if (count < 2) | (first >= count):
        return
    past = tl.load(contexts + row) - count
    lines = tl.arange(0, BLOCK_M)
    query = first + lines // GROUP
    head = kv_head * GROUP + lines % GROUP
    dims = tl.arange(0, DIM_PAD)
    there = (lines < TILE_Q * GROUP) & (query < count)
    inside = there[:, None] & (dims[None, :] < DIM)
    token = (begin + query).to(tl.int64)
    q_at = q + (token * q_token_stride + head * q_head_stride)[:, None] + dims[None, :]
    queries = tl.load(q_at, mask=inside, other=0.0)
    positions = past + query
    end = past + tl.minimum(first + TILE_Q, count)
    start = tl.maximum(past + first - window + 1, 0) // BLOCK_N * BLOCK_N
    # blocks that every query of the tile sees in full need no mask
    clear = tl.maximum((past + first + 1) // BLOCK_N * BLOCK_N, start)
    clear = tl.where(end > window, start, clear)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)
    k_cache += kv_head * DIM
    v_cache += kv_head * DIM
    tables += row.to(tl.int64) * table_stride
    m, total, acc = visit(
        m,
        total,
        acc,
        queries,
        k_cache,
        v_cache,
        tables,
        positions,
        start,
        clear,
        window,
        scale,
        softcap,
        KV_HEADS * DIM,
        DIM,
        DIM_PAD,
        PAGE,
        BLOCK_N,
        CAPPED,
        0,
    )
    m, total, acc = visit(
        m,
        total,
        acc,
        queries,
        k_cache,
        v_cache,
        tables,
        positions,
        clear,
        end,
        window,
        scale,
        softcap,
        KV_HEADS * DIM,
        DIM,
        DIM_PAD,
        PAGE,
        BLOCK_N,
        CAPPED,
        2,
    )
    if sinks is not None:
        fade, total = with_sink(m, total, tl.load(sinks + head))
        acc = acc * fade[:, None]
    result = normalised(acc, total).to(out.dtype.element_ty)
    out_at = out + ((token * (KV_HEADS * GROUP) + head) * DIM)[:, None] + dims[None, :]
    tl.store(out_at, result, mask=inside)
