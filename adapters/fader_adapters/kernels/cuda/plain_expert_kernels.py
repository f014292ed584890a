"""The product of unquantised experts, in Triton. Knows pairs sorted by expert; chooses nothing."""

# ruff: noqa: ANN001, ANN201  (a kernel's docstring gives the types of its arguments)

import triton
import triton.language as tl

from fader_adapters.kernels.cuda.nf4_expert_kernels import pairs_of


@triton.jit(do_not_specialize=["experts"])
def plain_experts(
    x_ptr,
    w_ptr,
    bias_ptr,
    ends_ptr,
    out_ptr,
    experts,
    n,
    k,
    x_stride,
    w_expert,
    w_row,
    w_column,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[p, i] = Σ_j w[e, i, j] · x[p, j] (+ bias[e, i]), e = e(p).

    x     [pairs, k] sorted by expert, any float dtype; rows `x_stride` apart, columns adjacent
    w     [experts, n, k] of the same dtype, by its three strides
    bias  [experts, n] or unused
    ends  [experts] int32: where each expert's pairs end
    out   [pairs, n] any float dtype, rounded once
    grid  (⌈n/BN⌉, tiles), as many tiles as there can be: see nf4_experts
    Summed in fp32 in ascending order of j, BK at a time: a pair's bits depend on its own row of x
    and its expert alone, not on BM or where it lies in its tile.
    """
    expert, first, stop = pairs_of(  # pyright: ignore[reportGeneralTypeIssues]
        tl.program_id(1), ends_ptr, experts, BM
    )
    if expert >= experts:
        return
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    pair = first + tl.arange(0, BM)
    column = tl.arange(0, BK)
    line = tl.minimum(pair, stop - 1).to(tl.int64) * x_stride
    x_at = x_ptr + line[:, None] + column[None, :]
    matrix = w_ptr + expert.to(tl.int64) * w_expert
    kept = tl.minimum(row, n - 1).to(tl.int64) * w_row
    w_at = matrix + kept[:, None] + column.to(tl.int64)[None, :] * w_column
    acc = tl.zeros((BN, BM), tl.float32)
    for start in tl.range(0, k, BK, num_stages=STAGES):
        inside = (start + column < k)[None, :]
        w = tl.load(w_at, mask=inside, other=0.0)
        x = tl.load(x_at, mask=inside, other=0.0)
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        w_at += BK * w_column
        x_at += BK
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * n + row, mask=row < n, other=0.0)
        acc += bias.to(tl.float32)[:, None]
    out_at = out_ptr + pair.to(tl.int64)[None, :] * n + row[:, None]
    tl.store(out_at, acc, mask=(pair < stop)[None, :] & (row < n)[:, None])
