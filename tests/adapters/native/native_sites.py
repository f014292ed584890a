"""Random sites, adapters and blends, and the delta's definition in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fader_adapters.kernels import native

Blend = list[tuple[int, float]]


@dataclass(frozen=True)
class Case:
    tables: native.SiteTables
    dense: list[list[tuple[Tensor, Tensor] | None]]  # [slot][member] -> A [r, k], B [r, n]
    n: int
    k: int
    base: native.Nf4Panels | None = None


def make(
    ranks: list[int],
    sizes: list[int],
    k: int,
    dtype: torch.dtype,
    *,
    skip: set[tuple[int, int]] | None = None,
) -> Case:
    """Adapters of `ranks` (one a slot) over members of `sizes`; (slot, member) in `skip` stay
    untouched."""
    chunks, dense, at = [torch.full((5,), torch.nan)], [], 5
    shape = (len(ranks), len(sizes))
    a_off, b_off = torch.full(shape, -1), torch.full(shape, -1)
    rank, scale = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)
    for s, r in enumerate(ranks):
        row: list[tuple[Tensor, Tensor] | None] = []
        for m, n in enumerate(sizes):
            if (s, m) in (skip or set()):
                row.append(None)
                continue
            a, b = (torch.randn(r, k) / k**0.5).to(dtype), torch.randn(r, n).to(dtype)
            a_off[s, m], b_off[s, m] = at, at + a.numel()
            rank[s, m], scale[s, m] = r, 0.5 + 0.25 * s
            chunks += [a.reshape(-1).float(), b.reshape(-1).float()]
            at += a.numel() + b.numel()
            row.append((a, b))
        dense.append(row)
    cols, last = [], 0
    for n in sizes:
        cols.append((last, last + n))
        last += n
    arena = torch.cat(chunks).to(dtype)
    return Case(native.SiteTables(arena, a_off, b_off, rank, scale, cols), dense, last, k)


def plan_of(blends: list[Blend], tokens: list[int], slots: int) -> native.StepPlan:
    """`tokens[row]` consecutive tokens for each row."""
    return native.StepPlan.of(
        blends, [r for r, n in enumerate(tokens) for _ in range(n)], slots=slots
    )


def reference(case: Case, x: Tensor, blends: list[Blend], tokens: list[int]) -> Tensor:
    """Σ γ·s·(x·Aᵀ)·B in float64, [T, n]."""
    y = torch.zeros(x.shape[0], case.n, dtype=torch.float64)
    at = 0
    for blend, count in zip(blends, tokens, strict=True):
        for slot, gamma in blend:
            for m, (lo, hi) in enumerate(case.tables.cols):
                pair = case.dense[slot][m]
                if pair is not None and gamma != 0:
                    z = x[at : at + count].double() @ pair[0].double().T
                    y[at : at + count, lo:hi] += (
                        gamma * float(case.tables.scale[slot, m]) * (z @ pair[1].double())
                    )
        at += count
    return y
