"""RMS normalisation of rows in one call, gated or not. Knows transformers' forms; no models."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fader_adapters.kernels.native import checks
from fader_adapters.kernels.native.library import CODES, check, library
from fader_adapters.kernels.native.ops import Kind, Op, Tape
from fader_adapters.kernels.native.threads import threads


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, about_one: bool = False, tape: Tape | None = None
) -> Tensor:
    """weight·round(x/rms), or (1 + weight)·(x/rms) about one, with rms = √(mean(x²) + eps).

    x [M, k], rows may be strided, and weight [k] of one dtype, bf16 or fp32; sums in fp32; round()
    is to that dtype, as in Llama; about one, as in Gemma, only the result is rounded. A row's bits
    do not depend on the number of rows. Raises: TypeError, ValueError.
    """
    checks.tensor("weight", weight, checks.FLOATS, shape=(None,))
    checks.inputs("x", x, (weight.dtype,), weight.shape[0])
    out = torch.empty(x.shape, dtype=x.dtype)
    code = library().fader_rms_norm(
        x.shape[0],
        x.shape[1],
        x.data_ptr(),
        checks.row_stride(x),
        weight.data_ptr(),
        CODES[x.dtype],
        int(about_one),
        eps,
        out.data_ptr(),
        threads(),
    )
    check(code, "rms_norm")
    if tape is not None:
        op = Op(kind=Kind.NORM, map=about_one, dtype=CODES[x.dtype], scalar=eps)
        op.what, op.k, op.x_stride = weight.data_ptr(), x.shape[1], checks.row_stride(x)
        op.size[0] = x.shape[0]
        tape.note(op, x, out=out, keep=weight)
    return out


@dataclass(frozen=True, slots=True)
class GateForm:
    """How a norm is gated."""

    inside: bool
    """What is normalised is already gated."""
    sigmoid: bool
    """The gate opens by a sigmoid; else by SiLU."""


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    *,
    form: GateForm,
    group: int,
    eps: float,
    tape: Tape | None = None,
) -> Tensor:
    """weight·n(x)·act(gate), or weight·n(x·act(gate)) inside; n(x) = x/√(mean(x²) + eps) over each
    `group` elements of a row; one rounding to x's dtype.

    x, gate [M, k] of bf16 or fp32 each, rows may be strided; weight fp32 [k]; group divides k and
    is a multiple of 16. A row's bits do not depend on the number of rows. Raises: TypeError,
    ValueError.
    """
    checks.tensor("weight", weight, (torch.float32,), shape=(None,))
    checks.inputs("x", x, checks.FLOATS, weight.shape[0])
    checks.inputs("gate", gate, checks.FLOATS, weight.shape[0])
    if gate.shape != x.shape:
        raise ValueError(f"gate must have the shape of x {list(x.shape)}, got {list(gate.shape)}")
    out = torch.empty(x.shape, dtype=x.dtype)
    flags = int(form.inside) | int(form.sigmoid) << 1
    code = library().fader_gated_norm(
        x.shape[0],
        x.shape[1],
        group,
        x.data_ptr(),
        CODES[x.dtype],
        checks.row_stride(x),
        gate.data_ptr(),
        CODES[gate.dtype],
        checks.row_stride(gate),
        weight.data_ptr(),
        flags,
        eps,
        out.data_ptr(),
        threads(),
    )
    check(code, "gated_rms_norm")
    if tape is not None:
        op = Op(kind=Kind.GATED_NORM, map=flags, dtype=CODES[x.dtype], scalar=eps)
        op.out_dtype, op.what = CODES[gate.dtype], weight.data_ptr()
        op.k, op.n, op.x_stride = x.shape[1], group, checks.row_stride(x)
        op.y_stride, op.size[0] = checks.row_stride(gate), x.shape[0]
        tape.note(op, x, y=gate, out=out, keep=weight)
    return out
