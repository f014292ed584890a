"""What was found in an adapter's files, for people and health reports. Plain facts."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One adapted linear."""

    path: str
    """In the base."""
    rank: int
    alpha: float
    scale: float
    delta_norm: float
    """Frobenius norm of what is added to W: scale · B·A, for DoRA all of it."""


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """What was found in an adapter's files."""

    modules: tuple[ModuleReport, ...]
    """In base order."""
    total: int
    """Linears of the base."""
    peft_type: str
    rslora: bool
    source_dtypes: tuple[str, ...]
    """As safetensors spells them, sorted."""
    base_name: str | None
    """What the adapter says it was trained on."""
    kinds: tuple[str, ...] = ()
    """What it has beside A and B: "dora", "lora_bias", "trainable_tokens", "modules_to_save",
    "alora"."""
    unmatched: tuple[str, ...] = ()
    """Names of what is to be trained that the base has nothing of."""
    copies: tuple[str, ...] = ()
    """Tensors that are the base's own weights: they change nothing."""
    copies_not_compared: tuple[str, ...] = ()
    """Tensors that must be the base's own weights, which were not at hand."""
    invocation: tuple[int, ...] = ()
    """Tokens that activate it; none: it always applies."""

    @property
    def matched(self) -> int:
        return len(self.modules)

    @property
    def targets(self) -> tuple[str, ...]:
        """Last path components, sorted."""
        return tuple(sorted({module.path.rpartition(".")[2] for module in self.modules}))

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({module.rank for module in self.modules}))

    @property
    def alphas(self) -> tuple[float, ...]:
        return tuple(sorted({module.alpha for module in self.modules}))

    @property
    def scales(self) -> tuple[float, ...]:
        return tuple(sorted({module.scale for module in self.modules}))

    @property
    def delta_norm(self) -> float:
        """Frobenius norm of all deltas together."""
        return math.hypot(*(module.delta_norm for module in self.modules))


Verdict = Literal["named", "other", "unnamed"]
"""Every tensor fits the base; does the adapter name it too? By the last part of a path or id."""


@dataclass(frozen=True, slots=True)
class BaseMatch:
    """The base that an adapter was checked against, and what the adapter says of its own."""

    fingerprint: str
    """Of the base: sha256 of its model type and the path and shape of every linear."""
    claimed: str | None
    verdict: Verdict
    weights: str | None = None
    """sha256 over the base's weights, where they were hashed: two of one shape differ by it."""

    @property
    def told(self) -> str:
        """The verdict in words."""
        if self.verdict == "named":
            return "fits, and was trained on a base of this name"
        if self.verdict == "unnamed":
            return "fits; the adapter does not say what it was trained on"
        return f"fits, but was trained on {self.claimed!r}: right only if the weights are the same"


@dataclass(frozen=True, slots=True)
class KindHealth:
    """All adapted linears of one name, over all layers."""

    kind: str
    """Last component of their paths, e.g. q_proj."""
    modules: int
    ranks: tuple[int, ...]
    delta_norm: float
    """‖ΔW‖ of them together."""
    base_norm: float
    """‖W‖ of them together; 0 where the base's weights were not at hand."""

    @property
    def relative_norm(self) -> float | None:
        return self.delta_norm / self.base_norm if self.base_norm else None


@dataclass(frozen=True, slots=True)
class Health:
    """What an adapter would do to a base."""

    report: AdapterReport
    dtype: str
    """Of the weights in memory."""
    nbytes: int
    """In memory."""
    kinds: tuple[KindHealth, ...]
    """By name."""
    largest: float
    """Largest ‖ΔW‖/‖W‖ of one linear; 0 where the base's weights were not at hand."""
    match: BaseMatch

    @property
    def relative_norm(self) -> float | None:
        """‖ΔW‖/‖W‖ of all adapted linears together."""
        base = math.hypot(*(kind.base_norm for kind in self.kinds))
        return self.report.delta_norm / base if base else None


def health_facts(health: Health) -> dict[str, Any]:
    """The report as JSON holds it; norms are null where the base's weights were not at hand."""
    report, match = health.report, health.match
    return {
        "modules": report.matched,
        "total_modules": report.total,
        "targets": list(report.targets),
        "unmatched_targets": list(report.unmatched),
        "copies_of_base": list(report.copies),
        "rank": max(report.ranks),
        "ranks": list(report.ranks),
        "scales": list(report.scales),
        "kinds": ["lora", *report.kinds],
        "invocation_tokens": list(report.invocation) or None,
        "dtype": health.dtype,
        "source_dtypes": list(report.source_dtypes),
        "bytes": health.nbytes,
        "delta_norm": report.delta_norm,
        "relative_norm": health.relative_norm,
        "largest_relative_norm": health.largest,
        "sites": {
            kind.kind: {
                "modules": kind.modules,
                "ranks": list(kind.ranks),
                "delta_norm": kind.delta_norm,
                "relative_norm": kind.relative_norm,
            }
            for kind in health.kinds
        },
        "base_match": {
            "fingerprint": match.fingerprint,
            "weights": match.weights,
            "claimed": match.claimed,
            "verdict": match.verdict,
            "told": match.told,
        },
    }


def kinds_of(modules: Iterable[ModuleReport], base_norms: Iterable[float]) -> list[KindHealth]:
    """Modules and the norms of their base weights, put together by name."""
    found: dict[str, list[tuple[ModuleReport, float]]] = {}
    for module, norm in zip(modules, base_norms, strict=True):
        found.setdefault(module.path.rpartition(".")[2], []).append((module, norm))
    return [
        KindHealth(
            kind,
            len(own),
            tuple(sorted({module.rank for module, _ in own})),
            math.hypot(*(module.delta_norm for module, _ in own)),
            math.hypot(*(norm for _, norm in own)),
        )
        for kind, own in sorted(found.items())
    ]


def verdict(claimed: str | None, *base_names: str) -> Verdict:
    """Whether an adapter that fits says it was trained on a base of one of these names."""
    if not claimed:
        return "unnamed"
    return "named" if _last(claimed) in map(_last, base_names) else "other"


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
