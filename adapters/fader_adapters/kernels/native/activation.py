"""Activations of rows in one call. Knows formulas, no models."""

import ctypes

import torch
from torch import Tensor

from fader_adapters.kernels.native import checks
from fader_adapters.kernels.native.library import CODES, check, library
from fader_adapters.kernels.native.ops import Kind, Map, Op, Tape

ACTIVATIONS = (
    *(Map.SILU, Map.GELU, Map.GELU_TANH, Map.SIGMOID, Map.SOFTPLUS),
    *(Map.EXP, Map.LOG, Map.TANH),
)


def activation(x: Tensor, kind: Map, *, tape: Tape | None = None) -> Tensor:
    """SILU x·σ(x), GELU x·Φ(x) = ½x(1 + erf(x/√2)), GELU_TANH ½x(1 + tanh(√(2/π)(x + 0.044715x³))),
    SIGMOID σ(x) = 1/(1 + e⁻ˣ), SOFTPLUS log(1 + eˣ), EXP eˣ (0 below −87, e⁸⁸ above 88), LOG or
    TANH, in fp32, rounded once. GELU and TANH have a relative error of 4e-7 at most, wherever their
    value is no smaller than 1e-37.

    x [T, k] bf16 or fp32, rows may be strided → [T, k]. An element's bits depend on nothing but
    itself. Raises: TypeError, ValueError.
    """
    checks.rows("x", x, checks.FLOATS, shape=(None, None))
    if kind not in ACTIVATIONS:
        raise ValueError(f"kind must be an activation, got {kind!r}")
    out = torch.empty(x.shape, dtype=x.dtype)
    op = Op(kind=Kind.MAP, map=kind, dtype=CODES[x.dtype], out_dtype=CODES[x.dtype])
    op.x, op.out = x.data_ptr(), out.data_ptr()
    op.size[:] = (1, 1, *x.shape)
    op.x_step[:] = (0, 0, checks.row_stride(x), 1)
    op.out_step[:] = (0, 0, x.shape[1], 1)
    if out.numel():
        check(library().fader_map(ctypes.addressof(op)), "activation")
    if tape is not None:
        tape.note(op, x, out=out, keep=None)
    return out
