"""Proves every kernel right before any is timed: against float64, and bitsandbytes bit for bit."""

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from fader_adapters.kernels import native
from fader_adapters.kernels.measure import weights

BOUNDS = {"gemm": 2e-3, "delta": 1e-5, "dense": 1e-5, "attention": 5e-3, "quantise": 0.0}
"""Greatest error by kernel, see `_error`; quantise: share of bytes and scales that differ."""
ROWS, WIDTH, SLOTS, RANK = 37, 512, 8, 16


class ParityFailed(Exception):
    """A kernel is wrong on this machine, so no time of it means anything."""


def prove() -> dict[str, float]:
    """The errors by kernel. Raises ParityFailed when one is out of BOUNDS."""
    checks = {
        "gemm": gemm,
        "delta": delta,
        "dense": dense,
        "attention": attention,
        "quantise": quantise,
    }
    errors = {name: check() for name, check in checks.items()}
    wrong = {name: error for name, error in errors.items() if not error <= BOUNDS[name]}
    if wrong:
        told = ", ".join(
            f"{name} {error:.1e} > {BOUNDS[name]:.0e}" for name, error in wrong.items()
        )
        raise ParityFailed(f"parity failed, no figures: {told}")
    return errors


def gemm() -> float:
    """NF4 times bf16 rows."""
    weight, _, _ = weights.quantised(WIDTH, WIDTH)
    x = torch.randn(ROWS, WIDTH).bfloat16()
    return _error(native.gemm(x, weight), x.double() @ weight.dense(torch.float32).double().T)


def delta() -> float:
    """One adapter of several on every row."""
    tables = weights.adapters(SLOTS, RANK, WIDTH, WIDTH)
    x = torch.randn(ROWS, WIDTH).bfloat16()
    plan = weights.step([[(i % SLOTS, 1.0)] for i in range(ROWS)], slots=SLOTS)
    got = native.delta(torch.zeros(ROWS, WIDTH), x, tables, plan)
    both = tables.arena.double().view(SLOTS, 2, RANK, WIDTH)
    exact = [(x[i].double() @ both[i % SLOTS, 0].T) @ both[i % SLOTS, 1] for i in range(ROWS)]
    return _error(got, torch.stack(exact))


def dense() -> float:
    """The output layer's bf16 product."""
    weight, x = torch.randn(WIDTH, WIDTH).bfloat16(), torch.randn(ROWS, WIDTH).bfloat16()
    got = native.gemm(x, native.PlainPanels.pack(weight))
    return _error(got, x.double() @ weight.double().T)


def attention() -> float:
    """Rows of different contexts, grouped heads."""
    heads, kv_heads, dim, context = 8, 2, 64, [33, 7, 160]
    (keys, values), tables = weights.cache(3, 160, kv_heads=kv_heads, dim=dim)
    q = torch.randn(3, heads, dim).bfloat16()
    got = native.paged_attention(
        q,
        keys,
        values,
        q_start=torch.arange(4, dtype=torch.int32),
        context=torch.tensor(context, dtype=torch.int32),
        block_tables=tables,
        scale=dim**-0.5,
    )
    exact = []
    for row, length in enumerate(context):
        k, v = (part[tables[row].long()].flatten(0, 1)[:length].double() for part in (keys, values))
        k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (k, v))
        scores = torch.einsum("hd,thd->ht", q[row].double(), k) * dim**-0.5
        exact.append(torch.einsum("ht,thd->hd", scores.softmax(-1), v))
    return _error(got, torch.stack(exact))


def quantise() -> float:
    """NF4 bytes and absmax beside bitsandbytes'."""
    weight = torch.randn(WIDTH, WIDTH).bfloat16()
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=native.BLOCK)
    got = native.quantise_nf4(weight)
    assert got.absmax is not None
    differ = (got.packed != packed).float().mean() + (got.absmax != state.absmax).float().mean()
    return float(differ)


def _error(got: Tensor, want: Tensor) -> float:
    """rms error over rms of `want`, or an eighth of the worst element's, if that is more: noise
    stays below eight times its rms, one wrong element does not."""
    off = (got.double() - want).abs()
    worst = torch.maximum(off.pow(2).mean().sqrt(), off.max() / 8)
    return float(worst / want.pow(2).mean().sqrt())
