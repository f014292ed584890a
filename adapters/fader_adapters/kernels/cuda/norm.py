"""RMS norm in Triton, a program a row: its bits do not depend on the number of rows."""
# ruff: noqa: ANN001, ANN201

from typing import Any

import torch
import triton
import triton.language as tl

from fader_adapters.kernels.cuda import norm_configs as configs


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


_kernel: Any = rms_norm_kernel


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
