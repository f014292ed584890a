"""A whole run: discover, prove parity, measure, or say why not. Knows no terminal and no files."""

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

from fader_server.bench.client import Ask, BenchClient, Clock, Fault, Sample, client_of
from fader_server.bench.discover import Served, discover
from fader_server.bench.figures import Repeat, measure
from fader_server.bench.load import (
    BackgroundLoad,
    MakeAsk,
    closed_loop,
    open_loop,
    poisson_arrivals,
)
from fader_server.bench.popularity import Draw, Popularity
from fader_server.bench.prompts import PromptSource
from fader_server.errors import ConfigInvalid

PARITY_TOKENS = 16
"""Length of a parity answer, unless the load's own is shorter."""
PARITY_LANES = 8
"""Parity questions asked at a time amid the load, and the load's lanes in an open loop."""


@dataclass(frozen=True, slots=True)
class Options:
    """What to run. ConfigInvalid when it cannot be a benchmark."""

    url: str
    scenarios: tuple[Popularity, ...]
    model: str | None = None
    adapters: tuple[str, ...] | None = ()
    """None: every adapter the server lists."""
    concurrency: int | None = 1
    """Requests in flight; None in an open loop."""
    rate: float | None = None
    """Arrivals a second; None in a closed loop."""
    requests: int = 64
    prompt_tokens: int = 128
    output_tokens: int = 64
    warmup: int = 0
    repeats: int = 1
    seed: int = 0
    timeout: float = 600.0
    api_key: str | None = field(default=None, repr=False)
    vocab: int | None = None
    ignore_base: bool = False
    temperature: float = 0.0
    """0: the likeliest tokens; above, drawn by a seed that follows from the prompt."""

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise ConfigInvalid("give either --concurrency (closed loop) or --rate (open loop)")
        for name in ("concurrency", "requests", "prompt_tokens", "output_tokens", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigInvalid(f"{name} must be at least 1, got {value}")
        if not 0 <= self.temperature <= 2:
            raise ConfigInvalid(f"temperature must be from 0 to 2, got {self.temperature}")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ConfigInvalid(f"rate must be above 0, got {self.rate}")
        if len(set(map(str, self.scenarios))) != len(self.scenarios):
            raise ConfigInvalid("every scenario of a comparison must be another one")
        if self.ignore_base and any(s.kind == "base" for s in self.scenarios):
            raise ConfigInvalid("--ignore-base leaves the base alone, so it cannot be measured")


@dataclass(slots=True)
class Result:
    """What a run found. Without faults it has figures, with faults it has none."""

    served: Served
    nonce: str
    repeats: dict[str, list[Repeat]] = field(default_factory=dict)
    faults: list[tuple[str, Fault]] = field(default_factory=list)
    """(model, why)."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    parity_models: int = 0
    like_base: tuple[str, ...] = ()
    """Adapters that answered the parity prompt exactly as the base did."""

    @property
    def ok(self) -> bool:
        return not self.faults


async def run(
    options: Options,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    clock: Clock = time.perf_counter,
) -> Result:
    """Run every scenario. ConfigInvalid for what the user can mend, faults are in the result."""
    made = client_of(options, temperature=options.temperature, transport=transport, clock=clock)
    async with made as client:
        served = await discover(
            client, model=options.model, adapters=options.adapters, vocab=options.vocab
        )
        return await _Run(options, client, served).all()


class _Run:
    """The state of one run."""

    def __init__(self, options: Options, client: BenchClient, served: Served) -> None:
        self._options = options
        self._client = client
        self._result = Result(served=served, nonce=secrets.token_hex(8))
        self._draws = {
            str(scenario): Draw(
                scenario,
                base=served.base,
                adapters=served.adapters,
                requests=options.requests,
                concurrency=options.concurrency,
                seed=options.seed,
            )
            for scenario in options.scenarios
        }
        self._prompts = PromptSource(
            served.vocabulary,
            length=options.prompt_tokens,
            key=f"{options.seed}:{self._result.nonce}",
        )

    async def all(self) -> Result:
        alone = await self._alone()
        for draw in self._draws.values():
            if self._result.ok:
                await self._amid(draw, alone)
        # Every round runs each scenario once, every other round backwards: drift hits all alike.
        for number in range(self._options.repeats):
            names = list(self._draws)
            for name in names if number % 2 == 0 else reversed(names):
                if self._result.ok:
                    await self._measure(name, number)
        return self._result

    async def _alone(self) -> dict[str, str]:
        """The parity prompt's answer for every model, one at a time with nothing else running."""
        drawn = [model for draw in self._draws.values() for model in draw.models]
        base = [] if self._options.ignore_base else [self._result.served.base]
        answers = {}
        for model in dict.fromkeys([*base, *drawn]):
            sample = await self._client.ask(self._parity_ask(model), fresh=False)
            self._note([sample])
            answers[model] = sample.text
            self._result.fingerprints[model] = sample.fingerprint
        self._result.parity_models = len(answers)
        if base and self._result.ok:
            self._result.like_base = tuple(
                model
                for model in answers
                if model != base[0] and answers[model] == answers[base[0]]
            )
        return answers

    async def _amid(self, draw: Draw, alone: dict[str, str]) -> None:
        """The same questions while the scenario's load runs: the answers must be the same."""
        options = self._options
        lanes = options.concurrency or PARITY_LANES
        gate = asyncio.Semaphore(PARITY_LANES)

        async def ask(model: str) -> Sample:
            async with gate:
                return await self._client.ask(self._parity_ask(model), fresh=False)

        load = BackgroundLoad(
            self._client, self._maker(draw, None), requests=options.warmup, concurrency=lanes
        )
        async with load:
            samples = await asyncio.gather(*(ask(model) for model in alone))
        self._note(load.samples)
        self._note(samples)
        for sample in samples:
            if sample.fault is None and sample.text != alone[sample.model]:
                detail = (
                    f"answered {alone[sample.model][:60]!r} alone and {sample.text[:60]!r} "
                    f"amid the load"
                )
                self._result.faults.append((sample.model, Fault("parity", detail)))

    async def _measure(self, name: str, number: int) -> None:
        options = self._options
        make = self._maker(self._draws[name], self._prompts.many(options.requests))
        cpu = time.process_time()
        if options.rate is not None:
            arrivals = poisson_arrivals(
                options.rate, options.requests, seed=options.seed * 1_000_003 + number
            )
            samples = await open_loop(self._client, make, arrivals=arrivals)
        else:
            samples = await closed_loop(
                self._client, make, requests=options.requests, concurrency=options.concurrency or 1
            )
        cpu = time.process_time() - cpu
        self._note(samples)
        if self._result.ok:
            self._result.repeats.setdefault(name, []).append(measure(samples, client_cpu_s=cpu))

    def _maker(self, draw: Draw, prompts: Sequence[tuple[int, ...]] | None) -> MakeAsk:
        """Asks of a scenario; without prepared prompts each one is drawn when it is sent."""

        def make(number: int, lane: int) -> Ask:
            prompt = self._prompts.take() if prompts is None else prompts[number]
            return Ask(draw.model(number, lane), prompt, self._options.output_tokens)

        return make

    def _parity_ask(self, model: str) -> Ask:
        vocabulary = self._result.served.vocabulary
        source = PromptSource(vocabulary, length=self._options.prompt_tokens, key="parity")
        return Ask(model, source.take(), min(PARITY_TOKENS, self._options.output_tokens))

    def _note(self, samples: Sequence[Sample]) -> None:
        self._result.faults += [(s.model, s.fault) for s in samples if s.fault is not None]
