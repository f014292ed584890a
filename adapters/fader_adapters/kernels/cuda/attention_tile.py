"""One tile of queries over a range of paged keys, with an online softmax (FlashAttention, Dao et
al. 2022). A block of keys that is masked entirely changes no bit: weights 0, rescale 1.
"""
# ruff: noqa: ANN001, ANN201, ANN202
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """Without overflow and without libdevice, which the interpreter lacks."""
    small = tl.exp2(-2.8853900817779268 * tl.abs(x))  # exp(-2|x|)
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def visit(
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
    Blocks and places at or past `end` are never read. Block numbers are read a turn ahead: keys and
    values are then one load away, and the compiler copies them ahead of their use.
    """
    dims = tl.arange(0, DIM_PAD)
    ahead = begin + tl.arange(0, BLOCK_N)
    coming = tl.load(table + ahead // PAGE, mask=ahead < end, other=0)
    for start in tl.range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        blocks = coming
        ahead = keys + BLOCK_N
        coming = tl.load(table + ahead // PAGE, mask=ahead < end, other=0)
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
def with_sink(m, total, sink):
    """(factor of the values, sum) of a softmax that a score without a value joins; m and sink in
    units of log2.
    """
    top = tl.maximum(m, sink)
    safe = tl.where(top == float("-inf"), 0.0, top)
    fade = tl.exp2(m - safe)
    return fade, total * fade + tl.exp2(sink - safe)


@triton.jit
def normalised(acc, total):
    """acc / total; zeros for queries that saw no key."""
    return acc / tl.where(total > 0, total, 1.0)[:, None]
