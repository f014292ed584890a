"""When requests are sent: closed loop, open loop, and a background load. Knows no statistics."""

import asyncio
import random
from collections.abc import Callable
from itertools import count
from typing import Protocol

from fader_server.bench.client import Ask, Clock, Sample

FAULTS_ENOUGH = 16
"""So many faults prove the run worthless: no new requests are sent after them."""

MakeAsk = Callable[[int, int], Ask]
"""(request number, lane) → what to ask."""


class Asker(Protocol):
    """What a load needs of a client."""

    clock: Clock

    async def ask(self, ask: Ask, *, due: float | None = None, fresh: bool = True) -> Sample: ...


async def closed_loop(
    client: Asker, make: MakeAsk, *, requests: int, concurrency: int
) -> list[Sample]:
    """`concurrency` lanes, each sending its next request when its last one ended."""
    samples: list[Sample] = []
    numbers = iter(range(requests))

    async def run(lane: int) -> None:
        for number in numbers:
            if _hopeless(samples):
                return
            samples.append(await client.ask(make(number, lane)))

    async with asyncio.TaskGroup() as lanes:
        for lane in range(min(concurrency, requests)):
            lanes.create_task(run(lane))
    return samples


def poisson_arrivals(rate: float, count: int, *, seed: int) -> list[float]:
    """Seconds from the start at which `count` requests arrive, `rate` a second on average."""
    rng = random.Random(f"arrivals:{seed}")  # noqa: S311 (load, not secrets)
    at, arrivals = 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate)
        arrivals.append(at)
    return arrivals


async def open_loop(client: Asker, make: MakeAsk, *, arrivals: list[float]) -> list[Sample]:
    """Requests sent at their arrival times, however many are still running."""
    samples: list[Sample] = []
    start = client.clock()

    async def run(number: int, due: float) -> None:
        samples.append(await client.ask(make(number, number), due=due))

    async with asyncio.TaskGroup() as tasks:
        for number, arrival in enumerate(arrivals):
            if _hopeless(samples):
                break
            await asyncio.sleep(max(0.0, start + arrival - client.clock()))
            tasks.create_task(run(number, start + arrival))
    return samples


class BackgroundLoad:
    """A closed loop that runs while its `async with` body does, and then finishes what it sent.

    At least `requests` are sent in all, so that the same load also warms the server up.
    """

    def __init__(self, client: Asker, make: MakeAsk, *, requests: int, concurrency: int) -> None:
        self._client = client
        self._make = make
        self._requests = requests
        self._concurrency = concurrency
        self._numbers = count()
        self._stopping = False
        self._running = asyncio.Event()
        self._lanes: list[asyncio.Task[None]] = []
        self.samples: list[Sample] = []

    async def __aenter__(self) -> "BackgroundLoad":
        self._lanes = [asyncio.create_task(self._run(lane)) for lane in range(self._concurrency)]
        await self._running.wait()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._lanes)

    async def _run(self, lane: int) -> None:
        for number in self._numbers:
            if _hopeless(self.samples) or (self._stopping and number >= self._requests):
                return
            self._running.set()
            self.samples.append(await self._client.ask(self._make(number, lane)))


def _hopeless(samples: list[Sample]) -> bool:
    return len(samples) >= FAULTS_ENOUGH and (
        sum(sample.fault is not None for sample in samples) >= FAULTS_ENOUGH
    )
