"""Rotary positions of queries and keys, and act(gate)·up, in one launch each. Elementwise: a row's
bits depend on the row alone. Knows no models."""
# ruff: noqa: ANN001, ANN201, ANN202

from typing import Any

import torch
import triton
import triton.language as tl

from fader_adapters.kernels.cuda import pointwise_configs as configs


@triton.jit
def _turned(x, cos, y, sin, dtype: tl.constexpr):
    """x·cos + y·sin, every product and the sum rounded to dtype as separate operators do."""
    a = (x.to(tl.float32) * cos.to(tl.float32)).to(dtype).to(tl.float32)
    b = (y.to(tl.float32) * sin.to(tl.float32)).to(dtype).to(tl.float32)
    return (a + b).to(dtype)


@triton.jit(do_not_specialize=["heads", "kv_heads"])
def rotary_kernel(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    q_token,
    q_head,
    k_token,
    k_head,
    cos_token,
    sin_token,
    heads,
    kv_heads,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    HEADS: tl.constexpr,
):
    """x₁·cos₁ − x₂·sin₁ and x₂·cos₂ + x₁·sin₂ for the halves of every head of q and k.

    Grid (T, ⌈heads/HEADS⌉ + ⌈kv_heads/HEADS⌉): blocks of q's heads, then of k's.
    q [T, heads, DIM], k [T, kv_heads, DIM] strided, values adjacent; q_out, k_out contiguous
    cos, sin [T, DIM] of q's dtype, tokens cos_token and sin_token apart
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    blocks = (heads + HEADS - 1) // HEADS
    source = q + token * q_token
    target = q_out + token * heads * DIM
    stride = q_head
    most = heads
    if block >= blocks:
        block -= blocks
        source = k + token * k_token
        target = k_out + token * kv_heads * DIM
        stride = k_head
        most = kv_heads
    head = block * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, HALF_PAD)
    half = at < DIM // 2
    inside = (head < most)[:, None] & half[None, :]
    x_at = source + head[:, None].to(tl.int64) * stride + at[None, :]
    low = tl.load(x_at, mask=inside, other=0.0)
    high = tl.load(x_at + DIM // 2, mask=inside, other=0.0)
    cos_at = cos + token * cos_token + at
    sin_at = sin + token * sin_token + at
    cos_low = tl.load(cos_at, mask=half, other=0.0)[None, :]
    cos_high = tl.load(cos_at + DIM // 2, mask=half, other=0.0)[None, :]
    sin_low = tl.load(sin_at, mask=half, other=0.0)[None, :]
    sin_high = tl.load(sin_at + DIM // 2, mask=half, other=0.0)[None, :]
    dtype: tl.constexpr = q_out.dtype.element_ty
    to = target + head[:, None] * DIM + at[None, :]
    tl.store(to, _turned(low, cos_low, -high, sin_low, dtype), mask=inside)
    tl.store(to + DIM // 2, _turned(high, cos_high, low, sin_high, dtype), mask=inside)


@triton.jit
def gated_kernel(
    gate,
    up,
    out,
    width,
    gate_row,
    up_row,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = act(gate)·up: act in fp32, rounded, then the product, rounded.

    Grid (T, ⌈width/BLOCK⌉). gate, up [T, width] rows gate_row and up_row apart; out contiguous
    GELU: its tanh form; else SiLU, x / (1 + exp(−x)).
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    at = x
    if GELU:  # (1 + tanh(u)) / 2 is the logistic function of 2u, without its cancellation
        at = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    small = tl.exp(-tl.abs(at))  # never overflows
    active = x * tl.where(at < 0, small, 1.0) / (1.0 + small)
    dtype: tl.constexpr = out.dtype.element_ty
    result = active.to(dtype).to(tl.float32) * y
    tl.store(out + row * width + column, result.to(dtype), mask=inside)


_rotary: Any = rotary_kernel
_gated: Any = gated_kernel


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, heads, dim] and k [T, kv_heads, dim] turned by cos, sin [T, dim], in new tensors.

    One dtype, the last axis adjacent everywhere, dim even. The bits of separate operators: each
    product and the sum are rounded, and no product is fused into the sum.
    """
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    assert k.shape == (tokens, kv_heads, dim)
    assert cos.shape == sin.shape == (tokens, dim)
    assert q.stride(2) == k.stride(2) == cos.stride(1) == sin.stride(1) == 1
    assert q.dtype == k.dtype == cos.dtype == sin.dtype
    q_out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device)
    k_out = torch.empty(tokens, kv_heads, dim, dtype=k.dtype, device=k.device)
    if tokens:
        constants = configs.rotary_constants(dim)
        blocks = -(-heads // constants["HEADS"]) - (-kv_heads // constants["HEADS"])
        _rotary[(tokens, blocks)](
            q,
            k,
            cos,
            sin,
            q_out,
            k_out,
            *q.stride()[:2],
            *k.stride()[:2],
            cos.stride(0),
            sin.stride(0),
            heads,
            kv_heads,
            **constants,
            num_warps=configs.WARPS,
            num_stages=1,
            enable_fp_fusion=False,
        )
    return q_out, k_out


def gated(gate: torch.Tensor, up: torch.Tensor, act: configs.Act) -> torch.Tensor:
    """act(gate)·up of [T, width] with adjacent columns, in a new tensor.

    The device's exp is a few units in the last place of fp32 from torch's: in bf16 that is another
    rounding of act(gate) now and then, in fp32 an error below 1e-6 of gate·up.
    """
    tokens, width = gate.shape
    assert up.shape == gate.shape
    assert gate.stride(1) == up.stride(1) == 1
    assert gate.dtype == up.dtype
    out = torch.empty(tokens, width, dtype=gate.dtype, device=gate.device)
    if tokens:
        constants = configs.gated_constants(act)
        _gated[(tokens, -(-width // constants["BLOCK"]))](
            gate,
            up,
            out,
            width,
            gate.stride(0) if tokens > 1 else width,
            up.stride(0) if tokens > 1 else width,
            **constants,
            num_warps=configs.WARPS,
            num_stages=1,
        )
    return out
