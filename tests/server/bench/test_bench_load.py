import asyncio
from dataclasses import dataclass, field

import pytest

from fader_server.bench.client import Ask, Fault, Sample
from fader_server.bench.load import (
    FAULTS_ENOUGH,
    BackgroundLoad,
    closed_loop,
    open_loop,
    poisson_arrivals,
)


@dataclass
class FakeAsker:
    """Answers after a few turns of the event loop, counting what is in flight."""

    fails: bool = False
    running: int = 0
    peak: int = 0
    asked: list[Ask] = field(default_factory=list)
    now: float = 0.0

    def clock(self) -> float:
        self.now += 0.001
        return self.now

    async def ask(self, ask: Ask, *, due: float | None = None, fresh: bool = True) -> Sample:
        self.asked.append(ask)
        self.running += 1
        self.peak = max(self.peak, self.running)
        for _ in range(3 + len(self.asked) % 5):
            await asyncio.sleep(0)
        self.running -= 1
        fault = Fault("http_500", "") if self.fails else None
        return Sample(ask.model, self.clock() if due is None else due, self.clock(), fault=fault)


def make(number: int, lane: int) -> Ask:
    return Ask(f"n{number}-l{lane}", (1,), 1)


async def test_closed_loop_keeps_its_concurrency_and_sends_each_number_once():
    asker = FakeAsker()
    samples = await closed_loop(asker, make, requests=30, concurrency=4)
    assert asker.peak == 4
    numbers = sorted(int(ask.model[1:].split("-")[0]) for ask in asker.asked)
    assert numbers == list(range(30))
    assert len(samples) == 30


async def test_closed_loop_stops_sending_when_nothing_works():
    asker = FakeAsker(fails=True)
    await closed_loop(asker, make, requests=1000, concurrency=4)
    assert FAULTS_ENOUGH <= len(asker.asked) < FAULTS_ENOUGH + 4


async def test_open_loop_does_not_wait_for_earlier_answers():
    asker = FakeAsker()
    samples = await open_loop(asker, make, arrivals=[0.0] * 12)
    assert asker.peak > 4
    assert {sample.due for sample in samples} == {0.001}


def test_arrivals_have_the_asked_rate_and_repeat_for_a_seed():
    arrivals = poisson_arrivals(50.0, 5000, seed=1)
    assert arrivals == sorted(arrivals)
    assert 5000 / arrivals[-1] == pytest.approx(50.0, rel=0.05)
    gaps = [b - a for a, b in zip([0.0, *arrivals], arrivals, strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.06)  # exponential, not a metronome
    assert arrivals == poisson_arrivals(50.0, 5000, seed=1)
    assert arrivals != poisson_arrivals(50.0, 5000, seed=2)


async def test_background_load_runs_as_long_as_its_body():
    asker = FakeAsker()
    async with BackgroundLoad(asker, make, requests=0, concurrency=3) as load:
        assert asker.running > 0
        for _ in range(100):
            await asyncio.sleep(0)
        assert asker.running > 0
    assert asker.running == 0
    assert len(load.samples) == len(asker.asked)


async def test_background_load_sends_at_least_its_warmup():
    for requests in (0, 25):
        asker = FakeAsker()
        async with BackgroundLoad(asker, make, requests=requests, concurrency=3):
            pass
        assert (len(asker.asked) >= 25) == (requests == 25)
