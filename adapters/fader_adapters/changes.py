"""What a blend of loaded adapters does to each linear. Knows no files, no sites."""

from collections.abc import Mapping

import torch

from fader_adapters.spec import AdapterData, BaseSpec, Blend, DeltaSpec, Digest
from fader_adapters.weightspace.terms import Sum


class Changes:
    """The deltas of one blend, linear by linear, read from the adapters' own memory.

    The caller's lease keeps that memory alive. Any thread.
    """

    def __init__(
        self, blend: Blend, adapters: Mapping[Digest, AdapterData], base: BaseSpec
    ) -> None:
        self.blend = blend
        self._base = base
        self._terms = [(term.gamma, adapters[term.version]) for term in blend.terms]

    def linears(self) -> set[int]:
        """Indices of the linears that a term touches."""
        return {delta.linear for _, data in self._terms for delta in data.spec.deltas}

    def sum(self, linear: int) -> Sum | None:
        """Δ = B·A of one linear in fp32; None where no term touches it."""
        parts = [
            _factors(data, delta, gamma, self._base)
            for gamma, data in self._terms
            if (delta := data.spec.by_linear.get(linear)) is not None
        ]
        if not parts:
            return None
        return Sum(torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1))


def _factors(
    data: AdapterData, delta: DeltaSpec, gamma: float, base: BaseSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and γ·s·B [out, rank]."""
    linear = base.linears[delta.linear]
    a = data.flat[delta.a_offset : delta.a_offset + delta.rank * linear.in_features]
    b = data.flat[delta.b_offset : delta.b_offset + delta.rank * linear.out_features]
    return (
        a.view(delta.rank, -1).float(),
        b.view(delta.rank, -1).float().T * (gamma * delta.scale),
    )
