"""One load for all who ask for a name that is not in memory. Knows names and errors, no files."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from fader_adapters.claims import NONE, Claims
from fader_adapters.errors import (
    AdapterError,
    AdapterNotFound,
    ArenaFull,
    SourceForbidden,
    SourceNotFound,
    SourceUnavailable,
    VersionConflict,
)
from fader_server.api.adapter_ports import Loaded, LoadOrder
from fader_server.errors import Overloaded
from fader_server.portions import Portions
from fader_server.refusals import Refusals

_log = logging.getLogger(__name__)

MAX_LOADS = 32
"""Loads under way; more are told to come again, of tenants that have their part of them."""
_LOOKS = 2 * MAX_LOADS
"""At disks at one time, on threads of their own: slow ones keep no other work from a thread."""


class LoadsByName(Protocol):
    """What loads when it is told to, and asks for room when there is none."""

    async def load(
        self, order: LoadOrder, *, make_room: Callable[[], bool] = lambda: False
    ) -> Loaded: ...

    async def bring(self, name: str, *, make_room: Callable[[], bool]) -> Loaded | None: ...

    def order_of(self, name: str) -> LoadOrder | None: ...

    def unload(self, name: str) -> None: ...


class Bringing:
    """Brings back what was loaded before, and new names where sources offer them. Belongs to the
    event loop."""

    def __init__(
        self,
        inner: LoadsByName,
        *,
        offers: Callable[[str], bool],
        make_room: Callable[[], bool],
        told: Callable[[str, float], None] = lambda result, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`offers(name)`: whether a source of this name may exist; cheap, called on a thread; may
        raise SourceUnavailable.

        `make_room` is called on the loader's thread. `told` hears of every load that was tried: ok
        or refused, and its seconds.
        """
        self._inner = inner
        self._offers = offers
        self._make_room = make_room
        self._told = told
        self._clock = clock
        self._disks = ThreadPoolExecutor(_LOOKS, "fader-look")
        self._flights: dict[str, asyncio.Task[Exception | None]] = {}
        self._loads = Portions()
        self._refusals = Refusals(clock)
        self._barred: set[str] = set()
        self._claims = NONE
        self.mine: set[str] = set()
        """Names that came by themselves, which may go for good when room is needed."""

    def claim(self, claims: Claims) -> None:
        """Names that are claimed are not looked for in the sources."""
        self._claims = claims

    def free(self, name: str) -> None:
        """It was loaded by hand: it may come back, and is not ours to drop."""
        self.mine.discard(name)
        self._barred.discard(name)
        self._refusals.forget(name)

    def bar(self, name: str) -> None:
        """It does not come back until it is free."""
        self.mine.discard(name)
        self._barred.add(name)

    def refused(self, name: str) -> AdapterError | None:
        """What is known to be refused, without another look."""
        barred = name in self._barred or name in self._claims.names
        return self._refusals.of(name) or (AdapterNotFound.of(name) if barred else None)

    async def offered(self, name: str, tenant: str) -> bool:
        """Whether a source of it may exist. Raises Overloaded, SourceUnavailable."""
        if self._loads.full(tenant, MAX_LOADS):  # a look at a slow disk takes a thread, as a load
            raise _too_many()
        try:
            with self._loads.one(tenant):
                return await self._look(name)
        except SourceUnavailable as error:
            raise self.refuse(name, error) from None

    async def _look(self, name: str) -> bool:
        return await asyncio.get_running_loop().run_in_executor(self._disks, self._offers, name)

    async def bring(self, name: str, tenant: str) -> Exception | None:
        """Have the name loaded; why not, else."""
        refused = self.refused(name)
        if refused is not None:
            return refused
        flight = self._flights.get(name)
        if flight is None:
            flight = asyncio.create_task(self._load(name, tenant))
            self._flights[name] = flight
            flight.add_done_callback(lambda _: self._flights.pop(name, None))
        return await asyncio.shield(flight)  # who asked first may leave; the others wait on

    async def _load(self, name: str, tenant: str) -> Exception | None:
        if self._loads.full(tenant, MAX_LOADS):
            return _too_many()
        began = self._clock()
        try:
            with self._loads.one(tenant):
                parked = self._inner.order_of(name) is not None
                if not parked and not await self._look(name):
                    return self.refuse(name, SourceNotFound("no such source"))
                loaded = await self._fetch(name, parked=parked)
        except VersionConflict:
            return None  # somebody else loaded the name meanwhile
        except AdapterError as error:
            self.mine.discard(name)
            self._told("refused", self._clock() - began)
            return error if isinstance(error, ArenaFull) else self.refuse(name, error)
        self._told("ok", self._clock() - began)
        if name in self._barred:  # unloaded while it was loading
            self._inner.unload(name)
            return AdapterNotFound.of(name)
        if loaded is None:
            return None
        fields = {"adapter": name, "version": loaded.info.version}
        _log.info("adapter loaded on demand", extra={"fields": fields})
        return None

    async def _fetch(self, name: str, *, parked: bool) -> Loaded | None:
        """From where it was, or from a source of its name. Raises AdapterError."""
        if parked:
            return await self._inner.bring(name, make_room=self._make_room)
        self.mine.add(name)
        order = LoadOrder(name, name, if_version="")
        return await self._inner.load(order, make_room=self._make_room)

    def refuse(self, name: str, error: AdapterError) -> AdapterError:
        """Remember the failure. What is forbidden looks like what is not there."""
        if isinstance(error, SourceForbidden | SourceNotFound | AdapterNotFound):
            error = AdapterNotFound.of(name)
        else:
            fields = {"adapter": name, "reason": str(error)}
            _log.warning("adapter not loaded on demand", extra={"fields": fields})
        self._refusals.add(name, error)
        return error


def _too_many() -> Overloaded:
    return Overloaded("Too many adapters are being loaded.", retry_after=2)
