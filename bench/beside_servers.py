"""One load on several servers of one model and its adapters, in turn: Fader, vLLM, llama.cpp.

The servers run already; while one is loaded the others idle. Each must list the adapters among its
models, or at /lora-adapters (llama.cpp), under the same names. No figure unless every adapter is
seen to change the base's answer there and every request came out at its exact lengths. How many
answers amid the load were the answers alone is counted for each, and told beside the figures.

    python -m bench.beside_servers --server fader=http://127.0.0.1:8000 --server vllm=http://… \\
        [--adapters a00,a01,…] [--concurrency 1,8] [--rounds 3] [--json FILE]
"""

import argparse
import asyncio
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fader_server.bench.client import Ask, BenchClient, Fault, Sample
from fader_server.bench.discover import Served, discover
from fader_server.bench.figures import Repeat, across, measure
from fader_server.bench.load import closed_loop
from fader_server.bench.machine import machine_facts
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


def show(sides: Sequence[Side], loads: Sequence[Load], console: Console) -> None:
    """A table a load, or the faults and no figure."""
    faults = [(side.name, model, fault) for side in sides for model, fault in side.faults]
    for name, model, fault in faults[:16]:
        console.print(f"{name}: {model}: {fault.kind}: {fault.detail}", markup=False)
    if faults:
        console.print("FAILED, no figures")
        return
    for load in map(str, loads):
        table = Table("server", title=load, title_justify="left")
        for column in ("output tokens/s", "TTFT, ms", "TPOT, ms", "answers as alone"):
            table.add_column(column, justify="right", no_wrap=True)
        for side in sides:
            own = across(side.repeats[load])
            cells = [
                f"{own[key].median:.{d}f} ({own[key].low:.{d}f} … {own[key].high:.{d}f})"
                for key, d in (("output_tokens_per_s", 1), ("ttft_ms_p50", 0), ("tpot_ms_p50", 1))
                if key in own
            ]
            kept = side.kept[load]
            table.add_row(side.name, *cells, f"{kept.same} of {kept.asked}")
        console.print(table)


def document(settings: Settings, sides: Sequence[Side], notes: Sequence[str]) -> dict[str, Any]:
    """What was run and found. Without figures where anything failed."""
    told: dict[str, Any] = {
        "command": [Path(sys.executable).name, "-m", "bench.beside_servers", *sys.argv[1:]],
        "machine": machine_facts(),
        "notes": list(notes),
        "settings": asdict(settings),
        "ok": not any(side.faults for side in sides),
        "servers": {
            side.name: side.served.facts | {"faults": [asdict(f) for _, f in side.faults]}
            for side in sides
        },
    }
    if told["ok"]:
        told["loads"] = {
            str(load): {
                side.name: {key: asdict(s) for key, s in across(side.repeats[str(load)]).items()}
                | {"answers_as_alone": asdict(side.kept[str(load)])}
                for side in sides
            }
            for load in settings.loads
        }
    return told


async def compare(settings: Settings, servers: Mapping[str, str]) -> list[Side]:
    """Run every load on every server (name → URL). ConfigInvalid when one cannot be measured."""
    async with AsyncExitStack() as stack:
        sides = [
            await stack.enter_async_context(opened(name, url, settings))
            for name, url in servers.items()
        ]
        await Run(settings, sides).all()
    return sides


def main() -> None:
    """Read the command line, run, print. Exit codes: 1 for a failed run, 2 for a bad one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", action="append", required=True, metavar="NAME=URL")
    parser.add_argument("--adapters", default="", help="names with commas between")
    parser.add_argument("--concurrency", default="1,8", help="numbers with commas between")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2, help="of each lane, a round")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--note", action="append", default=[], help="of how servers run")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        settings = Settings(
            adapters=tuple(name for name in args.adapters.split(",") if name),
            concurrencies=tuple(int(number) for number in args.concurrency.split(",")),
            rounds=args.rounds,
            requests=args.requests,
            prompt_tokens=args.prompt_tokens,
            output_tokens=args.output_tokens,
        )
        sides = asyncio.run(compare(settings, dict(s.split("=", 1) for s in args.server)))
    except ConfigInvalid as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    show(sides, settings.loads, Console(width=110))
    if args.json:
        args.json.write_text(json.dumps(document(settings, sides, args.note), indent=1) + "\n")
    if any(side.faults for side in sides):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
