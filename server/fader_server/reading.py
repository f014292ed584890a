"""From an order to a checked adapter: the source is read once, hashed, parsed and compared.

Knows sources and threads; names, memory and leases are another's business.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from fader_adapters.errors import AdapterInvalid, SourceUnavailable, VersionConflict
from fader_adapters.inspection import Inspector
from fader_adapters.parse import ParsedAdapter
from fader_adapters.pauses import Pause
from fader_adapters.report import Health
from fader_adapters.roots import Found
from fader_adapters.source import RawAdapter
from fader_adapters.sources import Sources
from fader_server.api.adapter_ports import LoadOrder
from fader_server.daemon import call_in_daemon

_T = TypeVar("_T")
_FETCH_MARGIN = 5.0
"""Seconds over its own limit that a source has to end by itself."""
_REMOTE_LOADS = 4
"""Downloads at one time; folders never wait for them."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the store does not keep about a version under a name."""

    source: str
    revision: str | None
    created: int
    health: Health


class Reader:
    """Reads adapters, one at a time, on a thread of its own."""

    def __init__(
        self,
        inspector: Inspector,
        sources: Sources,
        *,
        fetch_timeout: float,
        require_sha256: bool,
    ) -> None:
        """`fetch_timeout`: seconds a source may take; `require_sha256`: clients must give one."""
        self._inspector = inspector
        self._sources = sources
        self._require_sha256 = require_sha256
        self._fetch_timeout = fetch_timeout + _FETCH_MARGIN
        self._downloads = asyncio.Semaphore(_REMOTE_LOADS)
        self._thread = ThreadPoolExecutor(1, "fader-load")

    async def run(self, work: Callable[..., _T], *arguments: object) -> _T:
        """The work on the reader's thread, after what was asked of it before."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, work, *arguments)

    async def fetch(self, order: LoadOrder) -> RawAdapter:
        """The bytes of what a client named. Raises AdapterError."""
        if self._require_sha256 and order.sha256 is None:
            raise AdapterInvalid(
                "this server loads adapters by their sha256 only (--require-sha256): give the "
                "version that an earlier load or notebook reported"
            )
        raw = await self.run(self._sources.fetch_local, order.source, order.revision)
        return await self._download(order) if raw is None else raw

    async def _download(self, order: LoadOrder) -> RawAdapter:
        """What a source does not end by itself ends here; its thread is left behind."""
        fetch = partial(self._sources.fetch_remote, order.source, order.revision)
        try:
            async with self._downloads, asyncio.timeout(self._fetch_timeout):
                return await call_in_daemon(fetch, name="fader-fetch")
        except TimeoutError:
            raise SourceUnavailable("the source did not answer in time; try again") from None

    def fetch_now(self, order: LoadOrder) -> RawAdapter:
        """The same on the caller's thread; needs no sha256."""
        return self._sources.fetch(order.source, order.revision)

    def fetch_trusted(self, source: str) -> RawAdapter:
        """The same for what the operator named."""
        return self._sources.fetch_trusted(source)

    def discover(self) -> list[Found]:
        """Every adapter directly under the roots. Raises OSError."""
        return self._sources.discover()

    def check(self, raw: RawAdapter, order: LoadOrder, pause: Pause) -> tuple[ParsedAdapter, Facts]:
        """Parse and compare with the base and the order. Raises AdapterError."""
        parsed = self._inspector.read(raw, pause)
        if order.sha256 is not None and parsed.spec.version != order.sha256.lower():
            raise VersionConflict(
                f"the source holds version {parsed.spec.version}, not the sha256 that was asked for"
            )
        health = self._inspector.health(parsed)
        return parsed, Facts(order.source, raw.revision, int(time.time()), health)
