"""Paged attention and the cache write in Triton. Knows rows, positions and blocks; no layers.

Tiled attention with an online softmax (FlashAttention, Dao et al. 2022), split over the keys for a
single query (Flash-Decoding, Dao et al. 2023). Every number that changes between steps comes from
device memory; grids are capacities and programs without work return at once.
A query's bits depend on its own row alone: key blocks are visited in one order, and a block that
is masked entirely changes nothing (weights 0, rescale 1).
Decode answers rows of one query, prefill all others, so both may run on one step.
"""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """Without overflow and without libdevice, which the interpreter lacks."""
    small = tl.exp2(-2.8853900817779268 * tl.abs(x))  # exp(-2|x|)
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def _splits_of(keys, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """(length, number) of a row's splits: a function of its visible keys alone, see
    attention_configs.split_keys.
    """
    length = SPLIT * tl.maximum(tl.cdiv(keys, SPLIT * MAX_SPLITS), 1)
    return length, tl.maximum(tl.cdiv(keys, length), 1)


@triton.jit
def _visit(
    m,
    total,
    acc,
    q,
    k_cache,
    v_cache,
    table,
    positions,
    begin,
    end,
    window,
    scale,
    softcap,
    STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr,
    MASK: tl.constexpr,
):
    """Fold keys [begin, end) into the running (maximum, sum, values) of a tile of queries.

    q [M, DIM_PAD], zero past DIM; positions [M] int32; m in units of log2. STRIDE: elements a
    token. MASK 0: every block is full and visible; 1: stop at `end`; 2: causal and window as well.
    Blocks and places at or past `end` are never read.
    """
    dims = tl.arange(0, DIM_PAD)
    for start in tl.range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        if MASK == 0:
            blocks = tl.load(table + keys // PAGE)
        else:
            blocks = tl.load(table + keys // PAGE, mask=keys < end, other=0)
        places = (blocks.to(tl.int64) * PAGE + keys % PAGE) * STRIDE
        k_at = k_cache + places[None, :] + dims[:, None]
        v_at = v_cache + places[:, None] + dims[None, :]
        if MASK == 0 and DIM == DIM_PAD:
            k = tl.load(k_at)
            v = tl.load(v_at)
        elif MASK == 0:
            k = tl.load(k_at, mask=dims[:, None] < DIM, other=0.0)
            v = tl.load(v_at, mask=dims[None, :] < DIM, other=0.0)
        else:
            k = tl.load(k_at, mask=(dims[:, None] < DIM) & (keys[None, :] < end), other=0.0)
            v = tl.load(v_at, mask=(dims[None, :] < DIM) & (keys[:, None] < end), other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if CAPPED:
            scores = _tanh(scores) * softcap
        if MASK == 1:
            scores = tl.where(keys[None, :] < end, scores, float("-inf"))
        if MASK == 2:
            distance = positions[:, None] - keys[None, :]
            scores = tl.where((distance >= 0) & (distance < window), scores, float("-inf"))
        top = tl.maximum(m, tl.max(scores, 1))
        safe = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(scores - safe[:, None])
        fade = tl.exp2(m - safe)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        m = top
    return m, total, acc


@triton.jit
def _normalised(acc, total):
    """acc / l; zeros for queries that saw no key."""
    return acc / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit(do_not_specialize=["table_stride", "window", "plane_splits"])
def decode_kernel(
    q,
    k_cache,
    v_cache,
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
    planes [rows, heads, plane_splits, DIM] fp32; stats [rows, heads, plane_splits, 2] fp32
    cu_tokens [rows + 1] int32; contexts [rows] int32, 0: a padding row, answered with zeros
    tables [rows, table_stride] int32
    scale, softcap: see attention.Scores; window: keys a query sees.
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
        m, total, acc = _visit(
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
            result = _normalised(acc, total)
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
    """Join the splits decode_kernel left, in ascending order; rows of one split are done already.

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
    result = acc / tl.sum(totals, 0)
    out_at = out + (token.to(tl.int64) * HEADS + head) * DIM + dims
    tl.store(out_at, result.to(out.dtype.element_ty), mask=dims < DIM)


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
    Key blocks start at multiples of BLOCK_N, so a chunk's borders do not show in the bits.
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
    m, total, acc = _visit(
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
    m, total, acc = _visit(
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
    result = _normalised(acc, total).to(out.dtype.element_ty)
    out_at = out + ((token * (KV_HEADS * GROUP) + head) * DIM)[:, None] + dims[None, :]
    tl.store(out_at, result, mask=inside)


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
