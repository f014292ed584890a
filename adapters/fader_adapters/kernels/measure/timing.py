"""Times methods in turn, so that a noisy moment falls on all of them. Knows no kernels."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Call = Callable[[], object]
TURN = 2e-2
"""Seconds a turn of one method lasts at least: a step calls site after site, so a call that follows
its like is what counts, not one whose code and pages others have just pushed out."""
LONGEST = 200
"""Calls a turn at most."""
SETTLING = 2e-2
"""Seconds of calls before a turn, unmeasured: until the threads of the one before, which wait by
spinning, are asleep, and its own are spread over the cores."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One method on one case, in milliseconds a call; `calls` of them in a row are a turn.

    spread: the middle half's width over the median.
    """

    case: str
    method: str
    median_ms: float
    best_ms: float
    spread: float
    calls: int


def interleave(case: str, methods: dict[str, Call], repeats: int) -> list[Timing]:
    """`repeats` (at least 2) rounds of a turn of each method, after some unmeasured calls."""
    counts = {name: min(LONGEST, _calls_in(TURN, call)) for name, call in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, call in methods.items():
            _calls_in(SETTLING, call)
            seconds[name].append(_turn(call, counts[name]) / counts[name])
    found = []
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        spread = (high - low) / middle
        found.append(Timing(case, name, middle * 1e3, min(values) * 1e3, spread, counts[name]))
    return found


def _turn(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def _calls_in(seconds: float, call: Call) -> int:
    """How many calls it takes to fill them, at least one."""
    end, count = time.perf_counter() + seconds, 0
    while not count or time.perf_counter() < end:
        call()
        count += 1
    return count
