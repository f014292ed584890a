"""Attention of rows of one query, split over the keys (Flash-Decoding, Dao et al. 2023), and the
cache write. Every number that changes between steps comes from device memory; grids are capacities
and programs without work return at once. A row's bits depend on that row alone.
"""
# ruff: noqa: ANN001, ANN201, ANN202
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from fader_adapters.kernels.cuda.attention_tile import normalised, visit, with_sink


@triton.jit
def _splits_of(keys, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """(length, number) of a row's splits: a function of its visible keys alone, see
    attention_configs.split_keys.
    """
    length = SPLIT * tl.maximum(tl.cdiv(keys, SPLIT * MAX_SPLITS), 1)
    return length, tl.maximum(tl.cdiv(keys, length), 1)


@triton.jit(do_not_specialize=["table_stride", "window", "plane_splits"])
def decode_kernel(
    q,
    k_cache,
    v_cache,
    sinks,
    out,
    planes,
    stats,
    cu_tokens,
    contexts,
    tables,
    table_stride,
    q_token_stride,
    q_head_stride,
    window,
    scale,
    softcap,
    plane_splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Rows of one query: partial sums a split, or the result itself where a row has one split.

    Grid (rows, kv_heads, any number of programs that share a row's splits).
    q [T, heads, DIM] strided; caches [blocks, PAGE, KV_HEADS, DIM]; out [T, heads, DIM] contiguous
    sinks [heads] fp32, scores without values in units of log2; None: none
    planes [rows, heads, plane_splits, DIM] fp32; stats [rows, heads, plane_splits, 2] fp32
    cu_tokens [rows + 1] int32; contexts [rows] int32, 0: a padding row, answered with zeros
    tables [rows, table_stride] int32
    scale, softcap: see attention.PagedAttention; window: keys a query sees.
    """
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    token = tl.load(cu_tokens + row)
    if tl.load(cu_tokens + row + 1) - token != 1:
        return
    context = tl.load(contexts + row)
    first = tl.maximum(context - window, 0)
    length, splits = _splits_of(context - first, SPLIT, MAX_SPLITS)
    heads = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, DIM_PAD)
    inside = (heads[:, None] < GROUP) & (dims[None, :] < DIM)
    head = kv_head * GROUP + heads
    q_at = q + token.to(tl.int64) * q_token_stride + head[:, None] * q_head_stride + dims[None, :]
    queries = tl.load(q_at, mask=inside, other=0.0)
    positions = tl.zeros([GROUP_PAD], tl.int32) + (context - 1)
    for split in tl.range(tl.program_id(2), splits, tl.num_programs(2)):
        begin = first + split * length
        m, total, acc = visit(
            tl.full([GROUP_PAD], float("-inf"), tl.float32),
            tl.zeros([GROUP_PAD], tl.float32),
            tl.zeros([GROUP_PAD, DIM_PAD], tl.float32),
            queries,
            k_cache + kv_head * DIM,
            v_cache + kv_head * DIM,
            tables + row.to(tl.int64) * table_stride,
            positions,
            begin,
            tl.minimum(begin + length, context),
            window,
            scale,
            softcap,
            KV_HEADS * DIM,
            DIM,
            DIM_PAD,
            PAGE,
            BLOCK_N,
            CAPPED,
            1,
        )
        if splits == 1:
            if sinks is not None:
                own = tl.load(sinks + head, mask=heads < GROUP, other=float("-inf"))
                fade, whole = with_sink(m, total, own)
                result = normalised(acc * fade[:, None], whole)
            else:
                result = normalised(acc, total)
            out_at = out + (token.to(tl.int64) * (KV_HEADS * GROUP) + head[:, None]) * DIM
            tl.store(out_at + dims[None, :], result.to(out.dtype.element_ty), mask=inside)
        else:
            plane = (row.to(tl.int64) * (KV_HEADS * GROUP) + head) * plane_splits + split
            tl.store(planes + plane[:, None] * DIM + dims[None, :], acc, mask=inside)
            tl.store(stats + plane * 2, m, mask=heads < GROUP)
            tl.store(stats + plane * 2 + 1, total, mask=heads < GROUP)


@triton.jit(do_not_specialize=["window", "plane_splits"])
def reduce_kernel(
    out,
    planes,
    stats,
    sinks,
    cu_tokens,
    contexts,
    window,
    plane_splits,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Join the splits decode_kernel left, in ascending order, and the sink behind them; rows of one
    split are done already.

    Grid (rows, heads); arguments as there.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(cu_tokens + row)
    context = tl.load(contexts + row)
    _, splits = _splits_of(tl.minimum(context, window), SPLIT, MAX_SPLITS)
    if (tl.load(cu_tokens + row + 1) - token != 1) | (splits == 1):
        return
    dims = tl.arange(0, DIM_PAD)
    base = (row.to(tl.int64) * HEADS + head) * plane_splits
    tops = tl.full([TILE], float("-inf"), tl.float32)
    for at in tl.range(0, splits, TILE):
        split = at + tl.arange(0, TILE)
        m = tl.load(stats + (base + split) * 2, mask=split < splits, other=float("-inf"))
        tops = tl.maximum(tops, m)
    top = tl.max(tops, 0)
    totals = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([DIM_PAD], tl.float32)
    for at in tl.range(0, splits, TILE):
        split = at + tl.arange(0, TILE)
        there = split < splits
        m = tl.load(stats + (base + split) * 2, mask=there, other=float("-inf"))
        part_total = tl.load(stats + (base + split) * 2 + 1, mask=there, other=0.0)
        inside = there[:, None] & (dims[None, :] < DIM)
        part = planes + (base + split)[:, None] * DIM + dims[None, :]
        weight = tl.exp2(m - top)
        totals += weight * part_total
        acc += tl.sum(weight[:, None] * tl.load(part, mask=inside, other=0.0), 0)
    total = tl.sum(totals, 0)
    if sinks is not None:
        fade, total = with_sink(top, total, tl.load(sinks + head))
        acc = acc * fade
    result = acc / total
    out_at = out + (token.to(tl.int64) * HEADS + head) * DIM + dims
    tl.store(out_at, result.to(out.dtype.element_ty), mask=dims < DIM)


@triton.jit
def write_kernel(
    k,
    v,
    slots,
    k_cache,
    v_cache,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store k and v [T, KV_HEADS, DIM], strided, at slots [T] int64 of the caches; < 0 skips one.

    Grid (T, cdiv(KV_HEADS · DIM, BLOCK)); caches [blocks, PAGE, KV_HEADS, DIM] contiguous.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < KV_HEADS * DIM
    head, dim = at // DIM, at % DIM
    keys = tl.load(k + token * k_token_stride + head * k_head_stride + dim, mask=inside)
    values = tl.load(v + token * v_token_stride + head * v_head_stride + dim, mask=inside)
    tl.store(k_cache + slot * (KV_HEADS * DIM) + at, keys, mask=inside)
    tl.store(v_cache + slot * (KV_HEADS * DIM) + at, values, mask=inside)
