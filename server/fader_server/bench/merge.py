"""What a merged lane costs and gives, over HTTP: itself, beside others, and while it is made."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise

import httpx

from fader_server.bench.client import Ask, BenchClient, Clock, Sample, client_of
from fader_server.bench.discover import discover
from fader_server.bench.figures import Repeat, measure
from fader_server.bench.load import BackgroundLoad, closed_loop
from fader_server.bench.merge_result import Merge, Options, Result
from fader_server.bench.prompts import PromptSource
from fader_server.bench.stats import Summary, summarise
from fader_server.errors import ConfigInvalid

Sleep = Callable[[float], Awaitable[None]]

_PARITY_TOKENS = 16
_POLL_SECONDS = 0.05


async def run(
    options: Options,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    clock: Clock = time.perf_counter,
    sleep: Sleep = asyncio.sleep,
) -> Result:
    """Run everything. ConfigInvalid for what the user can mend, faults are in the result."""
    async with client_of(options, transport=transport, clock=clock) as client:
        served = await discover(client, model=None, adapters=None, vocab=None)
        names = [options.adapter] if options.adapter else list(served.adapters[:1])
        others = [name for name in served.adapters if name not in names]
        if not names or not others:
            raise ConfigInvalid("the server needs two adapters: one to merge and one to compare")
        result = Result(served, names[0], others[0])
        return await _Run(options, client, result, sleep=sleep).all()


class _Run:
    """The state of one run."""

    def __init__(
        self, options: Options, client: BenchClient, result: Result, *, sleep: Sleep
    ) -> None:
        self._options = options
        self._sleep = sleep
        self._client = client
        self._result = result
        nonce = secrets.token_hex(8)
        self._prompts = PromptSource(
            result.served.vocabulary,
            length=options.prompt_tokens,
            key=f"{options.seed}:{nonce}",
        )

    async def all(self) -> Result:
        await self._drop()
        alone = {model: await self._text(model) for model in self._delta_models}
        if self._options.idle:
            await self._merge()
            await self._check(alone, "beside the lane")
        for number in range(0 if self._options.idle else self._options.repeats):
            await self._round(number, alone)
            if self._result.ok and number < self._options.busy_merges:
                await self._under_load()
            await self._check(alone, "after a merge")
            if not self._result.ok:
                break
        await self._drop()
        await self._check(alone, "after the lane was dropped")
        return self._result

    @property
    def _delta_models(self) -> list[str]:
        return [self._result.served.base, self._result.other]

    async def _round(self, number: int, alone: dict[str, str]) -> None:
        """Every other round backwards, so that drift hits both sides alike."""
        await self._drop()  # the lane that the round before made under load
        result, found = self._result, {}
        base, merged, other = result.served.base, result.adapter, result.other
        beside = [("base", base), ("merged", merged), ("delta beside", other)]
        phases = [beside, [("delta alone", other)]]
        for phase in phases if number % 2 == 0 else phases[::-1]:
            with_lane = phase is beside
            await (self._merge() if with_lane else self._drop())
            if not result.ok:
                return
            for name, model in phase if number % 2 == 0 else phase[::-1]:
                found[name] = await self._load(model)
            if with_lane:
                await self._check(alone, "beside the lane")
        if result.ok:
            result.rounds.append({name: repeat for name, repeat in found.items() if repeat})

    async def _load(self, model: str) -> Repeat | None:
        options = self._options
        prompts = self._prompts.many(options.requests + options.concurrency)
        asks = [Ask(model, prompt, options.output_tokens) for prompt in prompts]
        warm = await closed_loop(
            self._client,
            lambda number, lane: asks[-1 - lane],
            requests=options.concurrency,
            concurrency=options.concurrency,
        )
        cpu = time.process_time()
        samples = await closed_loop(
            self._client,
            lambda number, lane: asks[number],
            requests=options.requests,
            concurrency=options.concurrency,
        )
        cpu = time.process_time() - cpu
        self._note([*warm, *samples])
        return measure(samples, client_cpu_s=cpu) if self._result.ok else None

    async def _under_load(self) -> None:
        """Streams of the other adapter: some seconds alone, then through a whole merge."""
        options, clock = self._options, self._client.clock
        await self._drop()
        load = BackgroundLoad(
            self._client,
            lambda number, lane: Ask(
                self._result.other, self._prompts.take(), options.output_tokens
            ),
            requests=0,
            concurrency=options.concurrency,
        )
        async with load:
            await self._sleep(0.5)
            steady = clock()
            await self._sleep(options.steady_seconds)
            began = clock()
            await self._merge(busy=True)
            ended = clock()
        self._note(load.samples)
        before, during = _gaps(load.samples, steady, began), _gaps(load.samples, began, ended)
        if before is None or during is None:
            self._result.faults.append("too few tokens came while the lane was made")
        elif self._result.ok:
            self._result.gaps.append((before, during))

    async def _merge(self, *, busy: bool = False) -> None:
        body = {
            "adapters": [{"name": self._result.adapter}],
            "dtype": self._options.dtype,
            "force": True,
        }
        answer = await self._client.post("/v1/merge", body)
        while answer.status_code == 202 or (answer.status_code == 200 and _busy(answer)):
            await self._sleep(_POLL_SECONDS)
            answer = await self._client.get("/v1/merge")
        lane = answer.json().get("lane") if answer.status_code == 200 else None
        if lane is None:
            self._result.faults.append(
                f"/v1/merge answered {answer.status_code}: {answer.text[:300]}"
            )
            return
        self._result.merges.append(Merge(lane["seconds"], lane["bytes"], busy))
        report = lane["report"]
        self._result.report = {k: v for k, v in report.items() if k != "linears"}

    async def _drop(self) -> None:
        answer = await self._client.delete("/v1/merge")
        if answer.status_code == 404 and "merge_not_found" not in answer.text:
            raise ConfigInvalid("the server has no /v1/merge")
        if answer.status_code not in (200, 404):
            raise ConfigInvalid(f"DELETE /v1/merge answered {answer.status_code}; give the key")

    async def _text(self, model: str) -> str:
        vocabulary = self._result.served.vocabulary
        source = PromptSource(vocabulary, length=self._options.prompt_tokens, key="parity")
        sample = await self._client.ask(Ask(model, source.take(), _PARITY_TOKENS), fresh=False)
        self._note([sample])
        return sample.text

    async def _check(self, alone: dict[str, str], when: str) -> None:
        for model, text in alone.items():
            if await self._text(model) != text and self._result.ok:
                self._result.faults.append(f"{model} answers otherwise {when}")

    def _note(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            if sample.fault is not None:
                told = f"{sample.model}: {sample.fault.kind}: {sample.fault.detail}"
                self._result.faults.append(told)


def _busy(answer: httpx.Response) -> bool:
    return answer.json()["state"] in ("merging", "measuring")


def _gaps(samples: Sequence[Sample], begin: float, end: float) -> Summary | None:
    """Inter-token times in ms of tokens that came between two moments."""
    return summarise(
        (b - a) * 1e3
        for sample in samples
        for a, b in pairwise(sample.token_times)
        if begin <= a and b <= end
    )
