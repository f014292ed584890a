"""Plain weights times few rows at memory speed: lm_head, merged layers. Knows no adapters."""

import torch
from torch import Tensor

from fader_adapters.kernels.native import checks
from fader_adapters.kernels.native.library import CODES, check, library
from fader_adapters.kernels.native.ops import Kind, Op, Tape
from fader_adapters.kernels.native.threads import threads


def dense(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    tape: Tape | None = None,
) -> Tensor:
    """x·weightᵀ + bias with fp32 sums; a row's bits do not depend on the number of rows.

    x, weight: one dtype, bf16 or fp32, [M, k] (rows may be strided) and [n, k]; bias fp32 [n];
    out [M, n] bf16 or fp32, by default x's dtype. Meant for M up to about 16. Raises: TypeError,
    ValueError.
    """
    checks.tensor("weight", weight, checks.FLOATS, shape=(None, None))
    n, k = weight.shape
    checks.inputs("x", x, (weight.dtype,), k)
    if not n or not k:
        raise ValueError(f"weight must not be empty, got {list(weight.shape)}")
    if bias is not None:
        checks.tensor("bias", bias, (torch.float32,), shape=(n,))
    dtype = x.dtype if out is None else out.dtype
    if dtype not in checks.FLOATS:
        raise TypeError(f"out must be torch.float32 or torch.bfloat16, got {dtype}")
    out = checks.output("out", out, (x.shape[0], n), dtype)
    code = library().fader_dense(
        x.shape[0],
        n,
        k,
        x.data_ptr(),
        checks.row_stride(x),
        weight.data_ptr(),
        CODES[x.dtype],
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        CODES[dtype],
        checks.row_stride(out),
        threads(),
    )
    check(code, "dense")
    if tape is not None:
        op = Op(kind=Kind.DENSE, dtype=CODES[x.dtype], out_dtype=CODES[dtype], n=n, k=k)
        op.what, op.bias = weight.data_ptr(), None if bias is None else bias.data_ptr()
        op.x_stride, op.out_stride = checks.row_stride(x), checks.row_stride(out)
        op.size[0] = x.shape[0]
        tape.note(op, x, out=out, keep=(weight, bias))
    return out
