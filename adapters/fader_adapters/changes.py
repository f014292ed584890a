"""What a blend of loaded adapters does to each linear. Knows no files, no sites."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fader_adapters.invocation import require_everywhere
from fader_adapters.spec import AdapterData, BaseSpec, Blend, DeltaSpec, Digest, LinearSpec
from fader_adapters.weightspace.terms import Sum


@dataclass(frozen=True, slots=True)
class Change:
    """W·x + b → (1 + gain) ∘ (W·x) + Δ·x + b + bias, in fp32."""

    delta: Sum
    """Δ = B·A"""
    gain: torch.Tensor | None
    """[out]"""
    bias: torch.Tensor | None
    """[out]"""

    def to(self, device: torch.device) -> "Change":
        """The same on `device`; itself where it is there already."""
        if self.delta.a.device == device:
            return self
        gain, bias = (None if v is None else v.to(device) for v in (self.gain, self.bias))
        return Change(Sum(self.delta.a.to(device), self.delta.b.to(device)), gain, bias)

    def of_weight(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """(1 + gain) ∘ W + Δ for the rows of W [n, in] from `start` on."""
        stop = start + rows.shape[0]
        gain = self.gain
        merged = rows.clone() if gain is None else rows * (1 + gain[start:stop, None])
        return merged.addmm_(self.delta.b[start:stop], self.delta.a)

    def of_lookup(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """(1 + gain) ∘ y + Δ[:, id] for what an embedding gives for `ids` [n]: y [n, out]."""
        merged = rows.clone() if self.gain is None else rows * (1 + self.gain)
        return merged.addmm_(self.delta.a[:, ids].T, self.delta.b.T)


class Changes:
    """What one blend does, linear by linear, read from the adapters' own memory.

    The caller's lease keeps that memory alive. Any thread.
    """

    def __init__(
        self, blend: Blend, adapters: Mapping[Digest, AdapterData], base: BaseSpec
    ) -> None:
        """Raises BlendInvalid for an activated adapter."""
        require_everywhere(adapters[term.version].spec for term in blend.terms)
        self.blend = blend
        self._base = base
        self._terms = [(term.gamma, adapters[term.version]) for term in blend.terms]

    def linears(self) -> set[int]:
        """Indices of the linears that a term touches."""
        return {delta.linear for _, data in self._terms for delta in data.spec.deltas}

    def factor_bytes(self, linear: int) -> int:
        """What `of` takes for one linear or expert, at most: every factor in fp32, and all side by
        side."""
        found = (data.spec.by_linear.get(linear) for _, data in self._terms)
        rank = sum(delta.rank for delta in found if delta is not None)
        spec = self._base.linears[linear]
        return 2 * torch.float32.itemsize * rank * (spec.in_features + spec.out_features)

    def biases(self) -> set[int]:
        """Indices of the linears whose bias changes."""
        deltas = (delta for _, data in self._terms for delta in data.spec.deltas)
        return {delta.linear for delta in deltas if delta.bias_offset is not None}

    def of(self, linear: int, expert: int = 0) -> Change | None:
        """What happens to one linear, or one expert of a stack; None where no term touches it."""
        parts = [
            (gamma, data.flat, delta)
            for gamma, data in self._terms
            if (delta := data.spec.by_linear.get(linear)) is not None
        ]
        if not parts:
            return None
        spec = self._base.linears[linear]
        factors = [_factors(*part, spec, expert) for part in parts]
        delta = Sum(torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], dim=1))
        out = spec.out_features
        gains = [g * v for g, f, d in parts if (v := _vector(f, d.gain_offset, out)) is not None]
        biases = [
            g * d.scale * v
            for g, f, d in parts
            if (v := _vector(f, d.bias_offset, out)) is not None
        ]
        return Change(delta, _total(gains), _total(biases))


def _vector(flat: torch.Tensor, offset: int | None, size: int) -> torch.Tensor | None:
    return None if offset is None else flat[offset : offset + size].float()


def _total(vectors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return torch.stack(list(vectors)).sum(0) if vectors else None


def _factors(
    gamma: float, flat: torch.Tensor, delta: DeltaSpec, linear: LinearSpec, expert: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and γ·s·B [out, rank]."""

    def matrix(offset: int, width: int) -> torch.Tensor:
        size = delta.rank * width
        start = offset + expert * size
        return flat[start : start + size].view(delta.rank, width).float()

    a = matrix(delta.a_offset, linear.in_features)
    b = matrix(delta.b_offset, linear.out_features)
    return a, b.T * (gamma * delta.scale)
