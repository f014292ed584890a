"""What one more adapter costs, registering and finding it, against how many there are already.

Knows no terminal and no files. Loads every source under a name of its own, and clears up.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

from fader_server.bench.client import BenchClient, Clock, client_of
from fader_server.bench.loads import find, load, unload
from fader_server.bench.stats import Summary, summary_of
from fader_server.errors import ConfigInvalid

PREFIX = "bench-growth-"
WINDOW = 100
"""Registrations that are measured up to each point."""
LOOKUPS = 50


@dataclass(frozen=True, slots=True)
class GrowthOptions:
    """What to run. ConfigInvalid when it cannot be a benchmark."""

    url: str
    sources: tuple[str, ...]
    """As the server knows them, each another adapter."""
    timeout: float = 600.0
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if len(set(self.sources)) < 10:
            raise ConfigInvalid("growth needs ten adapters at least, or there is nothing to see")


@dataclass(frozen=True, slots=True)
class Point:
    """With `registered` names beside those the server had before. Times in milliseconds."""

    registered: int
    register: Summary
    """PUT of each of the last ones, from sending it to its answer."""
    lookup: Summary
    """GET of one name, drawn over all of them."""


@dataclass(frozen=True, slots=True)
class Growth:
    """Points by the number registered."""

    points: tuple[Point, ...]

    @property
    def register(self) -> float:
        """Median of the last point over that of the first."""
        return self.points[-1].register.p50 / self.points[0].register.p50

    @property
    def lookup(self) -> float:
        return self.points[-1].lookup.p50 / self.points[0].lookup.p50


def points_to(count: int) -> tuple[int, ...]:
    """10, 100, 1000, … below `count`, and `count` itself."""
    powers = [10**k for k in range(1, 10) if 10**k < count]
    return (*powers, count)


async def run_growth(
    options: GrowthOptions,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    clock: Clock = time.perf_counter,
) -> Growth:
    """Register everything, measure on the way, unload it again. Raises ConfigInvalid."""
    async with client_of(options, transport=transport, clock=clock) as client:
        names: list[str] = []
        try:
            return Growth(tuple(await _points(client, options.sources, names)))
        finally:
            for name in names:
                await unload(client, name)


async def _points(client: BenchClient, sources: Sequence[str], names: list[str]) -> list[Point]:
    """`names` is filled as they are registered, so that the caller can clear up."""
    found, times = [], []
    wanted = points_to(len(sources))
    for number, source in enumerate(sources, 1):
        names.append(f"{PREFIX}{number}")
        times.append((await load(client, names[-1], source)).seconds * 1e3)
        if number in wanted:
            step = max(1, number // LOOKUPS)
            lookups = [await find(client, name) for name in (names[::step] * LOOKUPS)[:LOOKUPS]]
            found.append(
                Point(number, summary_of(times[-WINDOW:]), summary_of([s * 1e3 for s in lookups]))
            )
    return found
