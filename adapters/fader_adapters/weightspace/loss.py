"""What rounding a merged weight costs, measured against the delta it carries. Knows no files."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

Rows = Callable[[int, int], torch.Tensor]
"""Rows start..stop of a weight, [stop − start, in] in fp32."""

_CHUNK = 1 << 20
"""Elements compared at a time."""


@dataclass(frozen=True, slots=True)
class LinearLoss:
    """One adapted linear. Norms are Frobenius norms; W' is what was written for W + Δ."""

    path: str
    rank: int
    """Sum of the ranks of the terms."""
    weight_norm: float
    """‖W‖"""
    delta_norm: float
    """‖Δ‖"""
    error_norm: float
    """‖W' − (W + Δ)‖"""
    carried: float
    """⟨W' − Q(W), Δ⟩, Q(W) being the base in the same form."""

    @property
    def relative_error(self) -> float:
        """‖W' − (W + Δ)‖ / ‖Δ‖; 0: the delta is there exactly, or too small to change W."""
        return self.error_norm / self.delta_norm if self.delta_norm else 0.0

    @property
    def survival(self) -> float:
        """The share of Δ that is there; 1 where there is nothing to lose."""
        return self.carried / self.delta_norm**2 if self.delta_norm**2 else 1.0

    def document(self) -> dict[str, Any]:
        """For reports and manifests."""
        ratios = {"relative_error": self.relative_error, "survival": self.survival}
        return asdict(self) | ratios

    @staticmethod
    def of_document(document: dict[str, Any]) -> "LinearLoss":
        """What `document` told. Raises KeyError, TypeError, ValueError."""
        return LinearLoss(
            path=str(document["path"]),
            rank=int(document["rank"]),
            weight_norm=float(document["weight_norm"]),
            delta_norm=float(document["delta_norm"]),
            error_norm=float(document["error_norm"]),
            carried=float(document["carried"]),
        )


def measure(
    path: str, rank: int, merged: torch.Tensor, *, before: Rows, served: Rows, after: Rows
) -> LinearLoss:
    """Compare, a few rows at a time.

    merged  W + Δ, [out, in] in fp32
    before  W
    served  W in the form of the output: what the base would give without the delta
    after   W', what was written
    """
    out, width = merged.shape
    step = max(_CHUNK // width, 1)
    weight = delta = error = carried = 0.0
    for start in range(0, out, step):
        stop = min(start + step, out)
        given, wanted, made = before(start, stop), merged[start:stop], after(start, stop)
        difference = wanted - given
        weight += _square(given)
        delta += _square(difference)
        error += _square(made - wanted)
        carried += _product(made - served(start, stop), difference)
    return LinearLoss(path, rank, math.sqrt(weight), math.sqrt(delta), math.sqrt(error), carried)


def joined(parts: Iterable[LinearLoss]) -> LinearLoss:
    """The loss of one linear from those of its rows; at least one part."""
    parts = tuple(parts)
    return LinearLoss(
        parts[0].path,
        parts[0].rank,
        math.hypot(*(part.weight_norm for part in parts)),
        math.hypot(*(part.delta_norm for part in parts)),
        math.hypot(*(part.error_norm for part in parts)),
        sum(part.carried for part in parts),
    )


def overall(losses: Iterable[LinearLoss]) -> dict[str, Any]:
    """All linears together as if they were one."""
    losses = tuple(losses)
    told = joined(losses).document()
    del told["path"], told["rank"], told["carried"]
    worst = max(loss.relative_error for loss in losses)
    return {"linears": len(losses), **told, "worst_relative_error": worst}


def _square(values: torch.Tensor) -> float:
    return _product(values, values)


def _product(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.dot(one.reshape(-1), other.reshape(-1)))
