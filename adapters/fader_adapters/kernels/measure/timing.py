"""Times calls in turn, so that a noisy moment falls on all of them. Knows no kernels."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """One method on one case, in milliseconds; spread: the middle half's width over the median."""

    case: str
    method: str
    median_ms: float
    best_ms: float
    spread: float


def interleave(case: str, methods: dict[str, Call], repeats: int) -> list[Timing]:
    """Call every method once unmeasured, then `repeats` (at least 2) rounds of all of them."""
    for call in methods.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, call in methods.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    found = []
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found.append(Timing(case, name, middle * 1e3, min(values) * 1e3, (high - low) / middle))
    return found
