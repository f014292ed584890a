"""A blend of adapter folders as low-rank sums, linear by linear. Knows no checkpoint of a base."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fader_adapters.errors import AdapterError, BlendInvalid
from fader_adapters.invocation import require_everywhere
from fader_adapters.limits import Limits
from fader_adapters.parse import ParsedAdapter, read_adapter
from fader_adapters.source import LocalSources, RawAdapter
from fader_adapters.spec import MAX_WEIGHT, BaseSpec, BaseWeights, Blend, Digest, Term

_NOTHING = 1e-7
"""Of ‖A‖·‖B‖: a product below it is what rounding leaves of terms that cancel."""


@dataclass(frozen=True, slots=True)
class Ingredient:
    """An adapter's folder and its weight γ."""

    path: Path
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gamma) and abs(self.gamma) <= MAX_WEIGHT):
            raise BlendInvalid(
                f"{self.path}: the weight is {self.gamma}, expected one within ±{MAX_WEIGHT:g}"
            )


@dataclass(frozen=True, slots=True)
class Sum:
    """ΔW = gain∘W + B·A of one linear, all terms side by side, weights and scales inside; fp32."""

    a: torch.Tensor
    """[Σ rank, in]"""
    b: torch.Tensor
    """[out, Σ rank]"""
    gain: torch.Tensor | None = None
    """[out], of rows of W: what DoRA adds; None: 0"""

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def norm(self) -> float:
        """‖B·A‖ without the gain, from two Gram matrices in fp64, never the product itself."""
        a, b = self.a.double(), self.b.double()
        return math.sqrt(max(float(torch.sum((a @ a.T) * (b.T @ b))), 0.0))

    def add_to(self, weight: torch.Tensor) -> None:
        """W [out, in] in fp32 becomes W + ΔW."""
        if self.gain is not None:
            weight.mul_(1.0 + self.gain[:, None])
        weight.addmm_(self.b, self.a)


@dataclass(frozen=True)
class Mixture:
    """A checked blend: every version once, in the order of their digests."""

    blend: Blend
    adapters: tuple[tuple[float, ParsedAdapter], ...]
    """γ and adapter; weights in fp32."""
    sources: dict[Digest, str]
    """Where each version came from."""
    base: BaseSpec

    def linears(self) -> list[int]:
        """Indices of the adapted linears, in base order."""
        return sorted({d.linear for _, adapter in self.adapters for d in adapter.spec.deltas})

    def sum(self, linear: int, expert: int | None = None) -> Sum | None:
        """The delta of one linear, or one expert of a stack; None where no term touches it or
        nothing is left of it."""
        parts = list(self._parts(linear, expert))
        if not parts:
            return None
        gains = [part.gain for part in parts if part.gain is not None]
        total = Sum(
            torch.cat([part.a for part in parts]),
            torch.cat([part.b for part in parts], dim=1),
            torch.stack(gains).sum(dim=0) if gains else None,
        )
        if total.gain is not None and bool(total.gain.any()):
            return total
        size = float(total.a.norm()) * float(total.b.norm())
        return total if total.norm > _NOTHING * size else None

    def biased(self) -> list[int]:
        """Indices of the linears whose bias changes, in base order."""
        return sorted(
            {
                delta.linear
                for _, adapter in self.adapters
                for delta, factors in zip(adapter.spec.deltas, adapter.factors, strict=True)
                if factors.bias is not None
            }
        )

    def bias(self, linear: int) -> torch.Tensor | None:
        """What is added to the bias [out] of one linear, in fp32; None: nothing."""
        parts = [
            gamma * delta.scale * factors.bias.float()
            for gamma, adapter in self.adapters
            for delta, factors in zip(adapter.spec.deltas, adapter.factors, strict=True)
            if delta.linear == linear and factors.bias is not None
        ]
        return torch.stack(parts).sum(dim=0) if parts else None

    def facts(self) -> list[dict[str, object]]:
        """For reports."""
        return [
            {"adapter": self.sources[term.version], "version": term.version, "weight": term.gamma}
            for term in self.blend.terms
        ]

    def _parts(self, linear: int, expert: int | None) -> Iterator[Sum]:
        for gamma, adapter in self.adapters:
            for delta, factors in zip(adapter.spec.deltas, adapter.factors, strict=True):
                if delta.linear == linear:
                    gain = None if factors.gain is None else gamma * factors.gain
                    # the module goes on to multiply W's output, and with it that of the sum
                    scale = gamma * delta.scale / self.base.linears[linear].multiplier
                    a, bt = factors.a, factors.bt
                    if expert is not None:
                        a, bt = a[expert], bt[expert]
                    yield Sum(a, bt.T * scale, gain)


def read_raw(ingredients: Sequence[Ingredient], limits: Limits | None = None) -> list[RawAdapter]:
    """The files of every ingredient. Raises SourceNotFound and what `fetch_trusted` does."""
    sources = LocalSources((), limits)
    return [sources.fetch_trusted(item.path) for item in ingredients]


def mix(
    raws: Sequence[RawAdapter],
    gammas: Sequence[float],
    base: BaseSpec,
    *,
    weights: BaseWeights | None = None,
    limits: Limits | None = None,
) -> Mixture:
    """Check adapters against `base` and blend them; DoRA wants the base's `weights`.

    Raises AdapterInvalid, AdapterMismatch, BlendInvalid for an activated adapter (each names its
    adapter), BlendInvalid.
    """
    found: dict[Digest, tuple[float, ParsedAdapter]] = {}
    sources: dict[Digest, str] = {}
    terms = []
    for raw, gamma in zip(raws, gammas, strict=True):
        try:
            parsed = read_adapter(raw, base, dtype=torch.float32, limits=limits, weights=weights)
            require_everywhere([parsed.spec])
        except AdapterError as error:
            error.args = (f"{raw.origin}: {error}",)
            raise
        version = parsed.spec.version
        terms.append(Term(version, gamma))
        found[version], sources[version] = (gamma, parsed), raw.origin
    blend = Blend.of(terms)
    if not blend:
        raise BlendInvalid("the blend is empty: name adapters with weights that are not 0")
    return Mixture(blend, tuple(found[term.version] for term in blend.terms), sources, base)
