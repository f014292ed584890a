"""What a great many adapters cost: registering, finding, serving, and a first token by tier.

Knows no terminal and no files. The serving load is `bench serve`'s, parity check and all.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

from fader_server.bench.client import Ask, BenchClient, Clock, Sample, client_of
from fader_server.bench.discover import discover
from fader_server.bench.loads import find, load, report, unload
from fader_server.bench.popularity import Popularity
from fader_server.bench.prompts import PromptSource
from fader_server.bench.serve import Options, Result, run
from fader_server.bench.stats import Summary, summary_of
from fader_server.errors import ConfigInvalid

NAME, TWIN = "bench-scale", "bench-scale-twin"
LOOKUPS = 200
FIRST_TOKENS = 9


@dataclass(frozen=True, slots=True)
class ScaleOptions:
    """What to run over a server that knows `names`."""

    url: str
    names: tuple[str, ...]
    """Every adapter the server knows, the most popular first."""
    sources: tuple[str, ...]
    """Two that it may load, for the time from PUT to first token."""
    exponent: float = 1.0
    concurrency: int = 8
    requests: int = 64
    repeats: int = 3
    prompt_tokens: int = 64
    output_tokens: int = 32
    seed: int = 0
    timeout: float = 600.0
    api_key: str | None = field(default=None, repr=False)
    vocab: int | None = None

    def __post_init__(self) -> None:
        if len(self.names) < 10:
            raise ConfigInvalid(f"a server with many adapters is needed, got {len(self.names)}")
        if len(self.sources) < 2:
            raise ConfigInvalid("give two sources for the time from PUT to first token")


@dataclass(frozen=True, slots=True)
class Put:
    """Loads of content that was in one tier before. Times in milliseconds."""

    put: Summary
    """From sending the PUT to its answer."""
    to_first_token: Summary
    """And on to the first token of a request under the new name."""


@dataclass(frozen=True, slots=True)
class ScaleResult:
    """Figures are there when the load had no fault. Times in milliseconds."""

    load: Result
    """Scenarios: identical, then zipf."""
    known: int
    tiers: dict[str, int]
    """How many names were in each tier after the load."""
    lookup: Summary
    """GET of one name, drawn over all of them."""
    lookup_few: Summary
    """GET of one and the same name."""
    puts: dict[str, Put]
    """By the tier that the content was in: disk (nowhere else), host, device."""
    rank: int
    """Of what was put, the largest."""
    first_token: dict[str, Summary]
    """Of a request whose adapter was in that tier when it came, nothing else running."""

    @property
    def throughput(self) -> float | None:
        """Tokens a second of the zipf load over those of one adapter, medians; None: no figures."""
        rates = [
            sorted(r.output_tokens_per_s for r in repeats) for repeats in self.load.repeats.values()
        ]
        if not self.load.ok or len(rates) < 2:
            return None
        one, many = (found[len(found) // 2] for found in rates)
        return many / one


async def run_scale(
    options: ScaleOptions,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    clock: Clock = time.perf_counter,
) -> ScaleResult:
    """Measure everything. ConfigInvalid for what the user can mend."""
    async with client_of(options, transport=transport, clock=clock) as client:
        served = await discover(client, model=None, adapters=options.names[:1], vocab=options.vocab)
        length = options.prompt_tokens
        prompts = PromptSource(served.vocabulary, length=length, key=f"scale:{time.time_ns()}")
        side = _Side(client, prompts)
        try:
            firsts = await side.first_tokens(options.names)
            puts = await side.puts(options.sources)
        finally:
            await side.clear()
        found = await run(_serving(options), transport=transport, clock=clock)
        stride = max(1, len(options.names) // LOOKUPS)
        return ScaleResult(
            load=found,
            known=len(options.names),
            tiers=await side.tiers(),
            lookup=await side.lookups(options.names[::stride][:LOOKUPS]),
            lookup_few=await side.lookups(options.names[:1] * LOOKUPS),
            puts=puts,
            rank=side.rank,
            first_token=firsts,
        )


def _serving(options: ScaleOptions) -> Options:
    return Options(
        url=options.url,
        scenarios=(Popularity("identical"), Popularity("zipf", options.exponent)),
        adapters=options.names,
        concurrency=options.concurrency,
        requests=options.requests,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        warmup=options.concurrency,
        repeats=options.repeats,
        seed=options.seed,
        timeout=options.timeout,
        api_key=options.api_key,
        vocab=options.vocab,
    )


class _Side:
    """What is measured beside the load, one request at a time."""

    def __init__(self, client: BenchClient, prompts: PromptSource) -> None:
        self._client = client
        self._prompts = prompts
        self.rank = 0

    async def first_tokens(self, names: Sequence[str]) -> dict[str, Summary]:
        """First tokens by the tier that the server said the adapter was in just before."""
        times: dict[str, list[float]] = {}
        step = max(1, len(names) // (4 * FIRST_TOKENS))
        for name in (*names[::step], *[names[0]] * FIRST_TOKENS):
            tier = (await report(self._client, name))["tier"]
            if len(times.setdefault(tier, [])) < FIRST_TOKENS:
                times[tier].append(await self._first(name))
        return {tier: summary_of(values) for tier, values in times.items()}

    async def puts(self, sources: Sequence[str]) -> dict[str, Put]:
        """Content that is nowhere, then under a second name what was used, and what was not."""
        times: dict[str, list[tuple[float, float]]] = {}
        for number in range(FIRST_TOKENS):
            source = sources[number % len(sources)]
            for used in (True, False):
                await self.clear()
                fresh = await self._put(NAME, source, ask=used)
                if used:
                    times.setdefault("disk", []).append(fresh)
                tier = (await report(self._client, NAME))["tier"]
                times.setdefault(tier, []).append(await self._put(TWIN, source, ask=True))
        return {
            tier: Put(summary_of(put for put, _ in pairs), summary_of(whole for _, whole in pairs))
            for tier, pairs in times.items()
        }

    async def _put(self, name: str, source: str, *, ask: bool) -> tuple[float, float]:
        """(of the PUT, with the first token after it)."""
        one = await load(self._client, name, source)
        self.rank = max(self.rank, one.rank)
        put = one.seconds * 1e3
        return put, put + (await self._first(name) if ask else 0.0)

    async def clear(self) -> None:
        for name in (NAME, TWIN):
            await unload(self._client, name)

    async def lookups(self, names: Sequence[str]) -> Summary:
        return summary_of([await find(self._client, name) * 1e3 for name in names])

    async def tiers(self) -> dict[str, int]:
        answer = await self._client.get("/v1/adapters")
        found: dict[str, int] = {}
        for row in answer.json()["data"]:
            found[row["tier"]] = found.get(row["tier"], 0) + 1
        return dict(sorted(found.items()))

    async def _first(self, name: str) -> float:
        """Milliseconds from sending a request to its first token."""
        sample: Sample = await self._client.ask(Ask(name, self._prompts.take(), 2))
        if sample.fault is not None:
            raise ConfigInvalid(f"{name}: {sample.fault.kind}: {sample.fault.detail}")
        return (sample.token_times[0] - sample.due) * 1e3
