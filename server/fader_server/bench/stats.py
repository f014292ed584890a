"""Numbers about numbers: percentiles, summaries, spreads. Knows nothing of requests or clocks."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def percentile(ordered: Sequence[float], q: float) -> float:
    """The q-th percentile, 0 ≤ q ≤ 100, of values in ascending order.

    Linear interpolation between the two nearest ranks, as numpy's default. ValueError on no values.
    """
    if not ordered:
        raise ValueError("a percentile needs at least one value")
    position = (len(ordered) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True, slots=True)
class Summary:
    """One quantity over the requests (or tokens) of one repeat, in the unit of its values."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    low: float
    high: float


def summarise(values: Iterable[float]) -> Summary | None:
    """The summary of the values, None when there are none."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Summary(
        count=len(ordered),
        mean=math.fsum(ordered) / len(ordered),
        p50=percentile(ordered, 50),
        p95=percentile(ordered, 95),
        p99=percentile(ordered, 99),
        low=ordered[0],
        high=ordered[-1],
    )


def summary_of(values: Iterable[float]) -> Summary:
    """The same of values that are there."""
    found = summarise(values)
    assert found is not None
    return found


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure over the repeats of a run."""

    median: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    """Median, least and greatest. ValueError on no values."""
    ordered = sorted(values)
    return Spread(median=percentile(ordered, 50), low=ordered[0], high=ordered[-1])
