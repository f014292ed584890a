"""The best product of small factors: truncated SVD of a matrix, or of a product. Pure algebra.

Randomised range finding after Halko, Martinsson, Tropp, "Finding structure with randomness" (2011).
"""

import math
from dataclasses import dataclass

import torch

_EXACT = 512
"""Matrices whose smaller side is at most this are decomposed exactly."""
_OVERSAMPLE = 16
_ITERATIONS = 4
_CHUNK = 1 << 20
"""Elements of the residual computed at a time."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """Δ ≈ B·A, fp32, √σ in each factor."""

    a: torch.Tensor
    """[rank, in]"""
    b: torch.Tensor
    """[out, rank]"""
    singular: tuple[float, ...]
    """The σ that were kept, largest first."""
    norm: float
    """‖Δ‖, Frobenius."""
    error: float
    """‖Δ − B·A‖."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def truncate(
    delta: torch.Tensor, rank: int, *, seed: int = 0, exact: bool | None = None
) -> LowRank:
    """The `rank` largest singular directions of delta [out, in], fp32; fewer when it has fewer.

    exact  a full SVD, or randomised with oversampling and power iterations; None: by size
    The error is measured on the factors themselves, so that it holds for either way.
    """
    small = min(delta.shape)
    if exact is None:
        exact = small <= _EXACT or 2 * (rank + _OVERSAMPLE) >= small
    u, s, vt = (
        torch.linalg.svd(delta.double(), full_matrices=False)
        if exact
        else _randomised(delta, rank, seed)
    )
    a, b, kept = _factors(u, s, vt, rank)
    norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
    return LowRank(a, b, kept, norm, _residual(delta, a, b))


def truncate_product(b: torch.Tensor, a: torch.Tensor, rank: int) -> LowRank:
    """The same of b [out, R] · a [R, in] by QR of both factors; the product is never formed.

    The error is the tail of the singular values.
    """
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, vt = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    a_kept, b_kept, kept = _factors(qb @ u, s, vt @ qa.T, rank)
    norm = float(torch.linalg.vector_norm(s))
    return LowRank(a_kept, b_kept, kept, norm, float(torch.linalg.vector_norm(s[len(kept) :])))


def _randomised(
    delta: torch.Tensor, rank: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, width = delta.shape
    columns = min(rank + _OVERSAMPLE, out, width)
    generator = torch.Generator().manual_seed(seed)
    q = delta @ torch.randn(width, columns, generator=generator)
    for _ in range(_ITERATIONS):
        q, _ = torch.linalg.qr(q)
        q, _ = torch.linalg.qr(delta.T @ q)
        q = delta @ q
    q, _ = torch.linalg.qr(q)
    u, s, vt = torch.linalg.svd((q.T @ delta).double(), full_matrices=False)
    return q.double() @ u, s, vt


def _factors(
    u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, tuple[float, ...]]:
    """A, B and σ of the first `rank` directions; those that are only rounding are left out."""
    noise = float(s[0]) * max(u.shape[0], vt.shape[1]) * torch.finfo(torch.float64).eps
    kept = max(min(rank, int((s > noise).sum())), 1)
    root = s[:kept].sqrt()
    a = (root[:, None] * vt[:kept]).float().contiguous()
    b = (u[:, :kept] * root).float().contiguous()
    return a, b, tuple(s[:kept].tolist())


def _residual(delta: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    step = max(_CHUNK // delta.shape[1], 1)
    total = 0.0
    for start in range(0, delta.shape[0], step):
        rest = torch.addmm(delta[start : start + step], b[start : start + step], a, alpha=-1)
        total += float(torch.sum(rest * rest, dtype=torch.float64))
    return math.sqrt(total)
