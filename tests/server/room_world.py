"""Adapters that load on demand into little room: of so many ranks, without an engine."""

import asyncio
from collections.abc import Callable
from contextlib import nullcontext

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
from fader_server.room import Counted
from tests.server.engine.engine_world import version

WIDTH = 32
UNIT = 2 * WIDTH
"""Elements of an adapter of rank 1."""
BASE = BaseSpec((LinearSpec("l", WIDTH, WIDTH, 0),), Digest("0" * 64), "test")


class Ranked(Inspector):
    """The source `x-3` has rank 3."""

    def read(self, raw: RawAdapter, pause: Pause = never) -> ParsedAdapter:
        rank = int(raw.origin.rpartition("-")[2])
        spec = lay_out(BASE, version(raw.origin), [RankScale(0, rank, 1.0)])
        report = AdapterReport(
            (ModuleReport("l", rank, 1.0, 1.0, 1.0),), 1, "LORA", False, ("F32",), None
        )
        factors = Factors(torch.ones(rank, WIDTH), torch.ones(WIDTH, rank))
        return ParsedAdapter(spec, report, torch.float32, (factors,))


class Folders:
    def fetch_local(self, reference: str, revision: str | None) -> RawAdapter:
        return RawAdapter(b"", b"", reference)


class Served:
    """Adapters over an arena of `units`; on a device of its own when `buffers`."""

    def __init__(
        self,
        units: int,
        *,
        buffers: bool = False,
        max_adapters: int = 100,
        seconds: float = 4.0,
        counted: Counted = lambda tenant: nullcontext(),
    ) -> None:
        arena = torch.zeros(units * UNIT)
        self.pool = Pool(Tables(arena, 1), in_place=not buffers)
        self.registry = Registry(
            Ranked(BASE, dtype=torch.float32),
            tier=ArenaTier(torch.zeros_like(arena) if buffers else arena),
            pool=self.pool,
            sources=Folders(),  # pyright: ignore[reportArgumentType]
            forget=self._forget,
            max_terms=8,
            max_adapters=max_adapters,
            fetch_timeout=1.0,
        )
        parking = Parking(self.registry, fixed=frozenset(), limit=100)
        self.adapters = OnDemand(
            parking, offers=lambda name: False, room_seconds=seconds, counted=counted
        )

    def _forget(self, gone: Digest, then: Callable[[], None]) -> None:
        self.pool.forget(gone)
        then()

    async def load(self, *names: str) -> None:
        for name in names:
            await self.adapters.load(LoadOrder(name, name))

    async def lease(self, *names: str, tenant: str = ""):
        terms = [NamedTerm(AdapterRef(name), 1.0) for name in names]
        return await self.adapters.lease(terms, tenant=tenant)

    def asked(self, *names: str, tenant: str = "") -> "asyncio.Task":
        return asyncio.create_task(self.lease(*names, tenant=tenant))

    def tier(self, name: str) -> str:
        return self.adapters.get(AdapterRef(name)).tier

    @property
    def at_rest(self) -> bool:
        return self.registry.totals().leases == 0 and self.adapters._line.waiting == 0


async def settled(*tasks: "asyncio.Task") -> list[bool]:
    """Which of them are done after a while that is enough for a load."""
    await asyncio.sleep(0.15)
    return [task.done() for task in tasks]
