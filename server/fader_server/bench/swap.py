"""What loads and swaps cost those who stream. Knows no terminal and no files.

Every round runs the same streams twice, quiet and while one name is swapped without a pause, in
turn first. The answers of both must be the same, and the swapped name's must be its own.
"""

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import httpx

from fader_server.bench.client import Ask, BenchClient, Clock, Fault, Sample, client_of
from fader_server.bench.discover import Served, discover
from fader_server.bench.loads import Load, load, unload
from fader_server.bench.prompts import PromptSource
from fader_server.bench.stats import Summary, summarise
from fader_server.errors import ConfigInvalid

NAME = "bench-swap"
PROBE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class SwapOptions:
    """What to run. ConfigInvalid when it cannot be a benchmark."""

    url: str
    sources: tuple[str, ...]
    """What the server may load, at least two that answer differently; swapped in turn."""
    streams: int = 8
    adapters: tuple[str, ...] = ()
    """Of the streams, in turn; none: the base."""
    rounds: int = 4
    prompt_tokens: int = 64
    output_tokens: int = 160
    seed: int = 0
    timeout: float = 600.0
    api_key: str | None = field(default=None, repr=False)
    vocab: int | None = None

    def __post_init__(self) -> None:
        if len(set(self.sources)) < 2:
            raise ConfigInvalid("a swap needs two sources, one after another")
        for name in ("streams", "rounds", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise ConfigInvalid(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.output_tokens < 8:
            raise ConfigInvalid(f"output_tokens must be at least 8, got {self.output_tokens}")


@dataclass(frozen=True, slots=True)
class Phase:
    """One run of the streams. Times in milliseconds."""

    gaps: Summary
    """Between tokens, while all streams run."""
    loads: Summary | None
    """Of each PUT, from sending it to its answer; None when it was quiet."""
    seconds: float


@dataclass(slots=True)
class SwapResult:
    """Without faults it has figures, with faults it has none."""

    served: Served
    rounds: list[tuple[Phase, Phase]] = field(default_factory=list)
    """(quiet, swapping)"""
    pooled: tuple[Summary, Summary] | None = None
    """All gaps of all rounds: quiet, swapping."""
    adapter: Load | None = None
    """The largest that was swapped."""
    faults: list[tuple[str, Fault]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.faults

    @property
    def p99_ratio(self) -> float:
        """p99 between tokens while swapping over p99 quiet."""
        assert self.pooled is not None
        return self.pooled[1].p99 / self.pooled[0].p99

    @property
    def worst_gap(self) -> float:
        """The longest gap while swapping over the median one."""
        assert self.pooled is not None
        return self.pooled[1].high / self.pooled[1].p50


async def run_swap(
    options: SwapOptions,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    clock: Clock = time.perf_counter,
) -> SwapResult:
    """Run all rounds. ConfigInvalid for what the user can mend, faults are in the result."""
    async with client_of(options, transport=transport, clock=clock) as client:
        served = await discover(client, model=None, adapters=options.adapters, vocab=options.vocab)
        run = _Run(options, client, SwapResult(served))
        try:
            return await run.all()
        finally:
            await unload(client, NAME)


class _Run:
    def __init__(self, options: SwapOptions, client: BenchClient, result: SwapResult) -> None:
        self._options = options
        self._client = client
        self._result = result
        key = f"{options.seed}:{secrets.token_hex(8)}"
        vocabulary = result.served.vocabulary
        self._prompts = PromptSource(vocabulary, length=options.prompt_tokens, key=key)
        self._probe = PromptSource(vocabulary, length=options.prompt_tokens, key="probe").take()
        self._alone: dict[str, str] = {}
        self._loads: list[Load] = []
        self._swaps = 0

    async def all(self) -> SwapResult:
        options, result = self._options, self._result
        for source in options.sources:
            self._loads.append(await load(self._client, NAME, source))
            self._alone[source] = (await self._ask_probe()).text
        if not result.ok:
            return result
        if len(set(self._alone.values())) < 2:
            raise ConfigInvalid("all sources answer alike: nobody could tell one from another")
        await self._phase(self._prompts.many(options.streams), swapping=True)  # warms both up
        quiet: list[float] = []
        swapping: list[float] = []
        for number in range(options.rounds):
            prompts = self._prompts.many(options.streams)
            order = (False, True) if number % 2 == 0 else (True, False)
            phases = {busy: await self._phase(prompts, swapping=busy) for busy in order}
            if not result.ok:
                return result
            for busy, into in ((False, quiet), (True, swapping)):
                into += phases[busy][1]
            if phases[False][2] != phases[True][2]:
                detail = "the streams' answers changed while a name was swapped"
                result.faults.append((NAME, Fault("parity", detail)))
                return result
            result.rounds.append((phases[False][0], phases[True][0]))
        before, during = summarise(quiet), summarise(swapping)
        assert before is not None
        assert during is not None
        result.pooled = (before, during)
        result.adapter = max(self._loads, key=lambda one: one.bytes)
        return result

    async def _phase(
        self, prompts: Sequence[tuple[int, ...]], *, swapping: bool
    ) -> tuple[Phase, list[float], list[str]]:
        """One run of the streams: its figures, its gaps in milliseconds and its answers."""
        began = self._client.clock()
        done = asyncio.Event()
        swapper = asyncio.create_task(self._swap_until(done)) if swapping else None
        try:
            models = self._options.adapters or (self._result.served.base,)
            asks = [
                Ask(models[i % len(models)], prompt, self._options.output_tokens)
                for i, prompt in enumerate(prompts)
            ]
            samples = await asyncio.gather(*(self._client.ask(a, fresh=False) for a in asks))
        finally:
            done.set()
            loads = await swapper if swapper is not None else []
        self._note(samples)
        if swapping:
            await self._check_probe()
        gaps = _gaps(samples) if self._result.ok else [0.0]
        summary = summarise(gaps)
        assert summary is not None
        phase = Phase(
            summary, summarise(s * 1e3 for s in loads), max(s.end for s in samples) - began
        )
        return phase, gaps, [sample.text for sample in samples]

    async def _swap_until(self, done: asyncio.Event) -> list[float]:
        """Swap without a pause; the seconds of each."""
        seconds = []
        while not done.is_set():
            self._swaps += 1
            sources = self._options.sources
            one = await load(self._client, NAME, sources[self._swaps % len(sources)])
            seconds.append(one.seconds)
        return seconds

    async def _check_probe(self) -> None:
        source = self._options.sources[self._swaps % len(self._options.sources)]
        sample = await self._ask_probe()
        if sample.fault is None and sample.text != self._alone[source]:
            detail = f"after the swaps the name does not answer as {source} does"
            self._result.faults.append((NAME, Fault("parity", detail)))

    async def _ask_probe(self) -> Sample:
        sample = await self._client.ask(Ask(NAME, self._probe, PROBE_TOKENS), fresh=False)
        self._note([sample])
        return sample

    def _note(self, samples: Sequence[Sample]) -> None:
        self._result.faults += [(s.model, s.fault) for s in samples if s.fault is not None]


def _gaps(samples: Sequence[Sample]) -> list[float]:
    """Milliseconds between tokens from the last stream's first token to the first one's end."""
    start = max(sample.token_times[0] for sample in samples)
    stop = min(sample.token_times[-1] for sample in samples)
    found = [
        (b - a) * 1e3
        for sample in samples
        for a, b in pairwise(sample.token_times)
        if a >= start and b <= stop
    ]
    if not found:
        raise ConfigInvalid("the streams never ran together: ask for more output tokens")
    return found
