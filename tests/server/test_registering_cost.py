"""One more adapter costs the same whatever is registered: bytecodes of Fader's own, counted.

Times would measure the machine; what C does for a whole list (a copy, a sort) is not seen here.
"""

import asyncio
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from fader_adapters.inspection import Inspector
from fader_adapters.kernels.tables import Tables
from fader_adapters.parse import Factors, ParsedAdapter
from fader_adapters.pauses import Pause, never
from fader_adapters.pool import Pool
from fader_adapters.report import AdapterReport, ModuleReport
from fader_adapters.source import RawAdapter
from fader_adapters.spec import BaseSpec, Digest, LinearSpec, RankScale, lay_out
from fader_adapters.tiers import ArenaTier
from fader_server.api.adapter_ports import LoadOrder
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.ondemand import OnDemand
from fader_server.parking import Parking
from fader_server.registry import Registry
from fader_server.state import RememberedAdapters
from fader_server.state_entries import State
from fader_server.state_file import StateFile
from tests.server.engine.engine_world import version

FEW, MANY = 14, 98
WIDTH = 32
BASE = BaseSpec((LinearSpec("l", WIDTH, WIDTH, 0),), Digest("0" * 64), "test")
GROWS = ("state_entries.py", "state_file.py")
"""One file is written as a whole."""


@cache
def parsed(content: str) -> ParsedAdapter:
    spec = lay_out(BASE, version(content), [RankScale(0, 1, 1.0)])
    matrix = torch.ones(1, WIDTH)
    module = ModuleReport("l", 1, 1.0, 1.0, 1.0)
    report = AdapterReport((module,), 1, "LORA", False, ("F32",), None)
    return ParsedAdapter(spec, report, torch.float32, (Factors(matrix, matrix),))


class Numbered(Inspector):
    def read(self, raw: RawAdapter, pause: Pause = never) -> ParsedAdapter:
        return parsed(raw.origin)


class Folders:
    def fetch_local(self, reference: str, revision: str | None) -> RawAdapter:
        return RawAdapter(b"", b"", reference)


class Meter:
    """Counts the bytecodes of Fader's files, in every thread begun after it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.on = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        threading.settrace(self.trace)
        try:
            yield
        finally:
            threading.settrace(None)  # pyright: ignore[reportArgumentType] - None ends it

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        path = Path(frame.f_code.co_filename)
        if not self.on or "fader_" not in str(path):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        name = path.name

        def count(frame: FrameType, event: str, argument: object) -> Any:
            self.counts[name] += event == "opcode"
            return count

        return count

    async def of(self, work: Callable[[], Awaitable[object]]) -> dict[str, int]:
        self.counts.clear()
        before, self.on = sys.gettrace(), True
        sys.settrace(self.trace)
        try:
            await work()
        finally:
            sys.settrace(before)
            self.on = False
        return dict(self.counts)


class Stack:
    """Everything that stands behind PUT and a request's `model`, over an arena of `room`."""

    def __init__(self, directory: Path, *, room: int) -> None:
        arena = torch.zeros(room * 2 * WIDTH)
        self.pool = Pool(Tables(arena, 1), in_place=True)
        registry = Registry(
            Numbered(BASE, dtype=torch.float32),
            tier=ArenaTier(arena),
            pool=self.pool,
            sources=Folders(),  # pyright: ignore[reportArgumentType]
            forget=self._forget,
            max_terms=8,
            max_adapters=100_000,
            fetch_timeout=1.0,
        )
        parking = Parking(registry, fixed=frozenset(), limit=100_000)
        demand = OnDemand(parking, offers=lambda name: False)
        self.adapters = RememberedAdapters(demand, StateFile(directory), State())
        self.count = 0

    def _forget(self, gone: Digest, then: Callable[[], None]) -> None:
        self.pool.forget(gone)
        then()

    async def register(self) -> None:
        self.count += 1
        await self.adapters.load(LoadOrder(f"a{self.count}", f"content {self.count}"))

    async def look_up(self) -> None:
        self.adapters.get(AdapterRef(f"a{self.count // 2}"))

    async def lease(self) -> None:
        """Of the first one, which left memory long ago where there is no room for all."""
        (await self.adapters.lease([NamedTerm(AdapterRef("a1"), 1.0)])).release()

    async def unload(self) -> None:
        self.adapters.unload(f"a{self.count - 1}")
        await self.adapters.saved()

    async def count_all(self) -> None:
        self.adapters.totals()

    async def list_all(self) -> None:
        self.adapters.list()


Costs = dict[str, dict[str, int]]
"""By action: bytecodes by file."""


def costs(directory: Path, *, count: int, room: int) -> Costs:
    """With `count` adapters registered and memory for `room` of them."""
    meter = Meter()

    async def measure() -> Costs:
        stack = Stack(directory, room=room)
        for _ in range(count):
            await stack.register()
        actions = (
            stack.register,
            stack.look_up,
            stack.lease,
            stack.count_all,
            stack.unload,
            stack.list_all,
        )
        found = {action.__name__: await meter.of(action) for action in actions}
        stack.adapters.close()
        return found

    with meter.installed():
        return asyncio.run(measure())


def total(counts: dict[str, int]) -> int:
    return sum(count for name, count in counts.items() if name not in GROWS)


ROOMS: dict[str, Callable[[int], int]] = {
    "roomy": lambda count: count + 8,
    "full": lambda count: count,  # one more, and the longest unused leaves
    "mostly parked": lambda count: 12,
}


@pytest.fixture(scope="module", params=ROOMS)
def measured(request, tmp_path_factory):
    """With few and with many adapters."""
    return [
        costs(tmp_path_factory.mktemp("state"), count=count, room=ROOMS[request.param](count))
        for count in (FEW, MANY)
    ]


@pytest.mark.parametrize("action", ["register", "look_up", "lease", "unload", "count_all"])
def test_what_one_adapter_costs_does_not_grow_with_the_number_registered(measured, action):
    few, many = (found[action] for found in measured)
    assert total(few) > 50, "the meter is off"
    assert total(many) <= 1.1 * total(few) + 20, {
        name: (few.get(name, 0), count) for name, count in many.items()
    }


def test_what_is_for_all_of_them_grows_and_the_meter_sees_it(measured):
    """The control: a list of all, and the one file that is written as a whole."""
    few, many = (found["list_all"]["parking.py"] for found in measured)
    assert many > 4 * few
    few, many = (sum(found["register"].get(name, 0) for name in GROWS) for found in measured)
    assert many > 2 * few
