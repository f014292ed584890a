"""How a merged weight is rounded to NF4. Knows numbers only: no sites, no adapters."""

from dataclasses import dataclass
from typing import Literal

import torch

from fader_adapters.kernels import native, nf4
from fader_adapters.weightspace import quantised

Rounding = Literal["plain", "keep"]
"""plain: every weight to its nearest code, as bitsandbytes does; most of a small delta is lost.
keep: codes make up for each other's errors along the directions that the delta reads."""

WEAKEST, STRONGEST = 1.0, 256.0
"""Bounds of what an error along those directions counts beside one anywhere else."""


def directions(a: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the rows of A [r, in], fp32 [in, at most r]."""
    return torch.linalg.qr(a.T.double())[0].float().contiguous()


@dataclass(frozen=True, slots=True)
class Keep:
    """What codes shall keep, and how much that counts."""

    directions: torch.Tensor
    """Orthonormal, fp32 [in, r]."""
    strength: float

    @staticmethod
    def of(basis: torch.Tensor, given: torch.Tensor, wanted: torch.Tensor) -> "Keep":
        """For rows of W and of W + Δ: ‖W‖ / ‖Δ‖, so that a delta too small to move any code by
        itself still does. Measured: the best, or within noise of it, from deltas of 1 % of W's
        norm to those of 70 %."""
        delta = float((wanted - given).norm())
        ratio = float(given.norm()) / delta if delta else 0.0
        return Keep(basis, min(max(ratio, WEAKEST), STRONGEST))


def quantise(wanted: torch.Tensor, kept: Keep | None) -> nf4.Nf4Weight:
    """`wanted` [n, in] fp32 in NF4 with blocks of 64 and plain absmax.

    kept: None for plain rounding; else directions along which the codes' errors cancel: row by row
    and left to right each code is the one nearest to what minimises
    e² + strength·‖Σ e·directions‖². The absmax are plain rounding's, and so are size and speed.
    After GPTQ's and sigma-delta's error feedback. Raises CheckpointInvalid (NaN or Inf).
    """
    if kept is None:
        return quantised.quantise(wanted, dtype=torch.float32, nested=False).weight
    quantised.require_finite(wanted)
    n, width = wanted.shape
    if not native.available():
        return _quantise(wanted, kept)
    done = native.quantise_keeping(wanted.contiguous(), kept.directions, strength=kept.strength)
    assert done.absmax is not None
    return nf4.Nf4Weight(done.packed.reshape(-1), done.absmax, n, width)


def _quantise(wanted: torch.Tensor, kept: Keep) -> nf4.Nf4Weight:
    """The same in torch, a column at a time: the specification of the native kernel."""
    n, width = wanted.shape
    levels = nf4.codes()
    middles = (levels[1:] + levels[:-1]) / 2
    absmax = wanted.view(n, -1, nf4.BLOCK).abs().amax(2)
    scale = absmax.clamp_min(1e-38)
    basis, strength = kept.directions, kept.strength
    gain = strength / (1 + strength * basis.square().sum(1))
    error = wanted.new_zeros(n, basis.shape[1])
    codes = torch.empty(n, width, dtype=torch.uint8)
    for j in range(width):
        x, q = wanted[:, j], basis[j]
        target = (x - gain[j] * (error @ q)) / scale[:, j // nf4.BLOCK]
        at = torch.bucketize(target, middles)
        codes[:, j] = at
        error += torch.outer(levels[at] * absmax[:, j // nf4.BLOCK] - x, q)
    packed = codes[:, ::2] << 4 | codes[:, 1::2]
    return nf4.Nf4Weight(packed.reshape(-1), absmax.reshape(-1), n, width)
