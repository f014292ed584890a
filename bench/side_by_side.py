"""The same loads on several servers in turn: what is asked, of whom, and what came back.

Knows adapters by name, as Fader and vLLM take them, and by number, as llama.cpp's server does.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fader_server.bench.client import Ask, BenchClient, Fault, Sample
from fader_server.bench.discover import Served, discover
from fader_server.bench.figures import Repeat, measure
from fader_server.bench.load import closed_loop
from fader_server.bench.prompts import PromptSource
from fader_server.errors import ConfigInvalid

PARITY_TOKENS = 16
LOADS = ("base", "one adapter", "distinct")


class LlamaCpp(BenchClient):
    """A client of llama.cpp's server, which takes adapters by number and weight.

    Under load it closes connections that were kept alive without an answer, so each is used once.
    """

    def __init__(self, url: str, *, timeout: float) -> None:
        super().__init__(url, timeout=timeout, keep_alive=False)
        self.numbers: dict[str, int] = {}

    def body(self, ask: Ask) -> dict[str, Any]:
        on = self.numbers.get(ask.model)
        scales = [{"id": n, "scale": float(n == on)} for n in self.numbers.values()]
        return super().body(ask) | {"lora": scales, "cache_prompt": False}


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of every server."""

    what: str
    """One of LOADS."""
    concurrency: int

    def __str__(self) -> str:
        return f"{self.what}, {self.concurrency} at a time"


@dataclass(frozen=True, slots=True)
class Kept:
    """Answers amid a load that were the answers alone, of how many."""

    same: int
    asked: int


@dataclass(slots=True)
class Side:
    """One server and what was found of it."""

    name: str
    client: BenchClient
    served: Served
    alone: dict[str, str] = field(default_factory=dict)
    """model → its answer to the parity prompt with nothing else running"""
    kept: dict[str, Kept] = field(default_factory=dict)
    """By load."""
    repeats: dict[str, list[Repeat]] = field(default_factory=dict)
    faults: list[tuple[str, Fault]] = field(default_factory=list)

    def note(self, samples: Sequence[Sample]) -> None:
        self.faults += [(s.model, s.fault) for s in samples if s.fault is not None]


@dataclass(frozen=True, slots=True)
class Settings:
    """Of a run. ConfigInvalid when it cannot be one."""

    adapters: tuple[str, ...]
    concurrencies: tuple[int, ...]
    rounds: int
    requests: int
    """A lane of a load sends so many a round."""
    prompt_tokens: int
    output_tokens: int
    timeout: float = 900.0

    def __post_init__(self) -> None:
        most = max(self.concurrencies)
        if self.adapters and len(self.adapters) < most:
            raise ConfigInvalid(
                f"{most} different adapters at a time need {most}, got {len(self.adapters)}"
            )

    @property
    def loads(self) -> list[Load]:
        found = []
        for concurrency in self.concurrencies:
            kinds = LOADS if concurrency > 1 else LOADS[:2]
            found += [Load(kind, concurrency) for kind in kinds if kind == "base" or self.adapters]
        return found

    def model(self, load: Load, base: str, lane: int) -> str:
        """What lane number `lane` asks for."""
        if load.what == "base":
            return base
        return self.adapters[lane if load.what == "distinct" else 0]


@asynccontextmanager
async def opened(name: str, url: str, settings: Settings) -> AsyncIterator[Side]:
    """A client of the kind of server that answers there. ConfigInvalid without the adapters."""
    async with LlamaCpp(url, timeout=settings.timeout) as own:
        served = await discover(own, model=None, adapters=(), vocab=None)
        rows = await own.get("/lora-adapters")
        if rows.status_code == 200:
            own.numbers = {Path(row["path"]).stem: row["id"] for row in rows.json()}
            listed = list(own.numbers)
        else:
            listed = [card["id"] for card in (await own.get("/v1/models")).json()["data"]]
        missing = [adapter for adapter in settings.adapters if adapter not in listed]
        if missing:
            raise ConfigInvalid(f"{name} has no adapter {', '.join(missing)}, but {listed}")
        if own.numbers:
            yield Side(name, own, served)
            return
    async with BenchClient(url, timeout=settings.timeout) as client:
        yield Side(name, client, served)


class Run:
    """The state of a run. `prompts`: of one vocabulary, the least of all sides'."""

    def __init__(self, settings: Settings, sides: Sequence[Side]) -> None:
        self._settings = settings
        self._sides = sides
        ids = min((side.served.vocabulary for side in sides), key=len)
        self._prompts = PromptSource(
            ids, length=settings.prompt_tokens, key=f"beside:{secrets.token_hex(8)}"
        )
        self._parity = PromptSource(ids, length=settings.prompt_tokens, key="parity").take()

    async def all(self) -> None:
        """Fill every side's answers and figures; stops where a fault was seen."""
        for side in self._sides:
            await self._alone(side)
        for load in self._settings.loads:
            for side in self._sides:
                if self._good:
                    await self._amid(side, load)
        for number in range(self._settings.rounds):
            for load in self._settings.loads:
                # Every other round backwards: drift hits all alike.
                for side in self._sides if number % 2 == 0 else reversed(self._sides):
                    if self._good:
                        await self._measure(side, load)

    @property
    def _good(self) -> bool:
        return not any(side.faults for side in self._sides)

    async def _alone(self, side: Side) -> None:
        base = side.served.base
        for model in (base, *self._settings.adapters):
            sample = await side.client.ask(self._question(model), fresh=False)
            side.note([sample])
            side.alone[model] = sample.text
        if not side.faults:
            fault = Fault("parity", "answers exactly as the base")
            alike = (m for m in self._settings.adapters if side.alone[m] == side.alone[base])
            side.faults = [(model, fault) for model in alike]

    async def _amid(self, side: Side, load: Load) -> None:
        """The parity questions while the load runs, which also warms the server up."""
        lanes = range(load.concurrency)
        models = dict.fromkeys(self._settings.model(load, side.served.base, n) for n in lanes)
        # So many and no more: a server that prefers whom it runs would never come to the questions.
        async with asyncio.TaskGroup() as group:
            background = group.create_task(
                closed_loop(
                    side.client,
                    lambda _, lane: self._ask(side, load, lane, self._prompts.take()),
                    requests=2 * load.concurrency,
                    concurrency=load.concurrency,
                )
            )
            questions = [
                group.create_task(side.client.ask(self._question(model), fresh=False))
                for model in models
            ]
        samples = [question.result() for question in questions]
        side.note([*background.result(), *samples])
        same = sum(sample.text == side.alone[sample.model] for sample in samples)
        side.kept[str(load)] = Kept(same, len(samples))

    async def _measure(self, side: Side, load: Load) -> None:
        total = self._settings.requests * load.concurrency
        prompts = self._prompts.many(total)

        def make(number: int, lane: int) -> Ask:
            return self._ask(side, load, lane, prompts[number])

        cpu = time.process_time()
        samples = await closed_loop(side.client, make, requests=total, concurrency=load.concurrency)
        cpu = time.process_time() - cpu
        side.note(samples)
        if not side.faults:
            side.repeats.setdefault(str(load), []).append(measure(samples, client_cpu_s=cpu))

    def _ask(self, side: Side, load: Load, lane: int, prompt: tuple[int, ...]) -> Ask:
        model = self._settings.model(load, side.served.base, lane)
        return Ask(model, prompt, self._settings.output_tokens)

    def _question(self, model: str) -> Ask:
        return Ask(model, self._parity, PARITY_TOKENS)


async def compare(settings: Settings, servers: Mapping[str, str]) -> list[Side]:
    """Run every load on every server (name → URL). ConfigInvalid when one cannot be measured."""
    async with AsyncExitStack() as stack:
        sides = [
            await stack.enter_async_context(opened(name, url, settings))
            for name, url in servers.items()
        ]
        await Run(settings, sides).all()
    return sides
