"""RMS norms in Triton, gated too, a program a row: bits do not depend on the number of rows."""
# ruff: noqa: ANN001, ANN201, ANN202

from typing import Any

import torch
import triton
import triton.language as tl

from fader_adapters.kernels.cuda import norm_configs as configs
from fader_adapters.kernels.native import GateForm


@triton.jit
def rms_norm_kernel(
    x,
    weight,
    out,
    width,
    stride,
    eps,
    BLOCK: tl.constexpr,
    ABOUT_ONE: tl.constexpr,
):
    """x̂ = x / √(mean(x²) + eps) in fp32; out = w·x̂ rounded twice, or (1 + w)·x̂ rounded once.

    x [rows, width] rows `stride` apart; out [rows, width] contiguous, weight [width]; grid (rows,)
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values) / width + eps)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if ABOUT_ONE:
        result = values * scale * (1.0 + w)
    else:
        result = (values * scale).to(out.dtype.element_ty).to(tl.float32) * w
    tl.store(out + row * width + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _opened(gate, inside, SIGMOID: tl.constexpr):
    """How far gates at these places open."""
    g = tl.load(gate, mask=inside, other=0.0).to(tl.float32)
    small = tl.exp(-tl.abs(g))  # never overflows
    opened = tl.where(g < 0, small, 1.0) / (1.0 + small)
    if not SIGMOID:
        opened = g * opened
    return opened


@triton.jit
def gated_norm_kernel(
    x,
    gate,
    weight,
    out,
    group,
    x_row,
    gate_row,
    eps,
    BLOCK: tl.constexpr,
    INSIDE: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    """out = weight·n(x)·act(gate), INSIDE: weight·n(x·act(gate)); n(x) = x / √(mean(x²) + eps) of a
    group, all in fp32, rounded once; act is SiLU, or a SIGMOID.

    x, gate [rows, width] rows x_row and gate_row apart; weight [width] fp32; out [rows, width]
    contiguous; grid (width/group, rows)
    """
    row = tl.program_id(1).to(tl.int64)
    inner = tl.arange(0, BLOCK)
    at, inside = tl.program_id(0) * group + inner, inner < group
    values = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    if INSIDE:
        values = values * _opened(gate + row * gate_row + at, inside, SIGMOID)
    scale = 1.0 / tl.sqrt(tl.sum(values * values) / group + eps)
    result = values * scale * tl.load(weight + at, mask=inside, other=0.0)
    if not INSIDE:  # only now: a wide group fills the registers
        result = result * _opened(gate + row * gate_row + at, inside, SIGMOID)
    width = tl.num_programs(0) * group
    tl.store(out + row * width + at, result.to(out.dtype.element_ty), mask=inside)


_kernel: Any = rms_norm_kernel
_gated: Any = gated_norm_kernel


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, form: configs.Form
) -> torch.Tensor:
    """x [rows, width], columns adjacent, any float dtype; weight [width] of that dtype."""
    rows, width = x.shape
    assert x.stride(1) == 1
    assert width <= configs.MAX_WIDTH
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows:
        _kernel[(rows,)](
            x,
            weight,
            out,
            width,
            x.stride(0) if rows > 1 else width,
            eps,
            **configs.constants(width, form),
            num_warps=configs.warps(width),
            num_stages=1,
        )
    return out


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    *,
    form: GateForm,
    group: int,
    eps: float,
) -> torch.Tensor:
    """As the native one: x, gate [rows, width], columns adjacent, any float dtypes; weight fp32
    [width]; over each `group` columns of a row, one rounding to x's dtype."""
    rows, width = x.shape
    assert gate.shape == x.shape
    assert x.stride(1) == gate.stride(1) == 1
    assert width % group == 0
    assert group <= configs.MAX_WIDTH
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows:
        _gated[(width // group, rows)](
            x,
            gate,
            weight,
            out,
            group,
            x.stride(0) if rows > 1 else width,
            gate.stride(0) if rows > 1 else width,
            eps,
            **configs.gated_constants(group, inside=form.inside, sigmoid=form.sigmoid),
            num_warps=configs.warps(group),
            num_stages=1,
        )
    return out
