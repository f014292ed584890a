"""RMS normalisation of rows in one call. Knows the two forms transformers has; no models."""

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
