"""Adapters that load when a request needs them. Knows names and errors, no files.

What is not in memory comes back when it is asked for: what was loaded before always, new names
where sources offer them. When room is needed the longest unused leaves, never what is in use.
"""

import asyncio
import copy
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
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
from fader_adapters.room import InTheWay, RoomWanted
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.api.ports import AdapterInfo, Adapters, AdapterTotals, Lease, Loaded, LoadOrder
from fader_server.errors import Overloaded
from fader_server.portions import Portions
from fader_server.room import Counted, Line

_log = logging.getLogger(__name__)

BROKEN_SECONDS = 30.0
"""How long a refusal is repeated without another look at the source."""
PASSING_SECONDS = 3.0
"""The same for a refusal that time may mend: no room, no answer."""
MAX_REFUSALS = 4096
MAX_LOADS = 32
"""Loads under way; more are told to come again, of tenants that have their part of them."""
MAX_ATTEMPTS = 5
"""Loads into room that seemed to be there, until its request is told to come again."""


class Loader(Adapters, Protocol):
    """The adapters below: they load when they are told to, and can make room."""

    async def load(
        self, order: LoadOrder, *, make_room: Callable[[], bool] = lambda: False
    ) -> Loaded: ...

    async def bring(self, name: str, *, make_room: Callable[[], bool]) -> Loaded | None: ...

    def order_of(self, name: str) -> LoadOrder | None: ...

    def evict(
        self, may_go: Callable[[str], bool], *, drops: Callable[[str], bool]
    ) -> str | None: ...

    def in_the_way(self, wanted: RoomWanted, *, slow: Collection[str] = ()) -> InTheWay | None: ...


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A failed load, remembered."""

    kind: type[AdapterError]
    text: str
    until: float


class OnDemand:
    """Adapters over a loader. Belongs to the event loop."""

    def __init__(
        self,
        inner: Loader,
        *,
        offers: Callable[[str], bool],
        told: Callable[[str, float], None] = lambda result, seconds: None,
        clock: Callable[[], float] = time.monotonic,
        room_seconds: float = 150.0,
        max_waiting: int = 1024,
        counted: Counted = lambda tenant: nullcontext(),
    ) -> None:
        """`offers(name)`: whether a source of this name may exist; cheap, called on a thread.

        `told` hears of every load that was tried: ok or refused, and its seconds. A request waits
        `room_seconds` for leases of others to end where its adapters need the room, and at most
        `max_waiting` requests do, each of them within `counted`.
        """
        self._inner = inner
        self._offers = offers
        self._told = told
        self._clock = clock
        self._flights: dict[str, asyncio.Task[Exception | None]] = {}
        self._loads = Portions()
        self._refusals: OrderedDict[str, _Refusal] = OrderedDict()
        self._mine: set[str] = set()
        self._barred: set[str] = set()
        self._awaited: Counter[str] = Counter()
        self._claims = NONE
        self._room_seconds = room_seconds
        self._line = Line(self._way, longest=max_waiting, counted=counted)

    def share(self, weights: Mapping[str, float]) -> None:
        """Weights of the tenants that have another than 1, where they wait for room."""
        self._line.share(weights)

    async def lease(self, terms: Sequence[NamedTerm], *, tenant: str = "") -> Lease:
        """Take the lease; names that are missing are loaded first, one load for all who ask.

        Raises AdapterNotFound for what is not there or not allowed, the load's own error for what
        is there and cannot be loaded, Overloaded, TenantBusy, BlendInvalid.
        """
        names = frozenset(term.ref.name for term in terms)
        wanted = None
        passes = self._line.passes(names, missing=self._missing)
        if passes or not await self._exist(names, tenant):
            found = await self._attempt(terms, names, tenant)
            if not isinstance(found, RoomWanted):
                return found
            wanted = found
        scope = asyncio.timeout(self._room_seconds)
        try:
            async with scope:
                return await self._wait(terms, names, wanted, tenant=tenant)
        except TimeoutError:
            if not scope.expired():
                raise
            raise _no_room() from None

    async def _wait(
        self,
        terms: Sequence[NamedTerm],
        names: frozenset[str],
        wanted: RoomWanted | None,
        *,
        tenant: str,
    ) -> Lease:
        """The lease, when its turn for room has come. Raises what `lease` raises."""
        with self._line.joined(names, wanted, tenant=tenant) as place:
            for _ in range(MAX_ATTEMPTS):
                in_the_way = await self._line.turn(place)
                self._clear(in_the_way)
                found = await self._attempt(terms, names, tenant)
                if not isinstance(found, RoomWanted):
                    return found
                place.wanted = found
        raise _no_room()

    async def _attempt(
        self, terms: Sequence[NamedTerm], names: frozenset[str], tenant: str
    ) -> Lease | RoomWanted:
        """The lease, after what is missing was loaded; or the room that leases took just now."""
        try:
            return self._inner.acquire(terms)
        except AdapterNotFound:
            missing = self._absent(names)
            if not missing:
                raise
        self._awaited.update(names)  # none of them is evicted before this lease holds it
        try:
            for _ in range(MAX_ATTEMPTS):
                failures = await asyncio.gather(*(self._bring(name, tenant) for name in missing))
                if any(failures):
                    break
                try:
                    return self._inner.acquire(terms)
                except AdapterNotFound:
                    missing = self._absent(names)  # one was leaving before it was awaited
                    if not missing:
                        raise
            else:
                raise _no_room()
        finally:
            self._awaited.subtract(names)
            self._awaited = +self._awaited
        found = {n: f for n, f in zip(missing, failures, strict=True) if f is not None}
        full = {name: f for name, f in found.items() if isinstance(f, ArenaFull)}
        others = [f for name, f in found.items() if name not in full]
        if others:
            raise copy.copy(others[0])  # one each: a traceback is one request's
        wanted = self._wanted(names, full)
        if wanted is not None and self._way(wanted, ()) is not None:
            return wanted
        if len(names) == 1:  # what is too much together may fit alone
            self._refuse(missing[0], full[missing[0]])
        raise copy.copy(full[next(iter(full))])

    async def _exist(self, names: frozenset[str], tenant: str) -> bool:
        """Whether each is known, or a source of it may exist: others are refused without a wait."""
        strange = [
            name for name in names if self._missing(name) and self._inner.order_of(name) is None
        ]
        for name in strange:
            if self._refused(name) is not None or not await self._offered(name, tenant):
                return False
        return True

    async def _offered(self, name: str, tenant: str) -> bool:
        if self._loads.full(tenant, MAX_LOADS):  # a look at a slow disk takes a thread, as a load
            raise _too_many_loads()
        with self._loads.one(tenant):
            return await asyncio.to_thread(self._offers, name)

    def _refused(self, name: str) -> AdapterError | None:
        """What is known to be refused, without another look."""
        known = self._refusals.get(name)
        if known is not None and self._clock() < known.until:
            return known.kind(known.text)
        if name in self._barred or name in self._claims.names:
            return AdapterNotFound.of(name)
        return None

    def _absent(self, names: frozenset[str]) -> list[str]:
        """Those that are not in memory, the largest first."""
        return sorted(filter(self._missing, names), key=self._size, reverse=True)

    def _clear(self, names: frozenset[str]) -> None:
        """Let go of those that nobody uses or waits for."""
        while self._evict(lambda name: name in names and not self._awaited[name]):
            pass

    def _wanted(self, names: frozenset[str], full: Mapping[str, ArenaFull]) -> RoomWanted | None:
        """The room that was missing; None: no lease that ends would help."""
        pieces = [failure.nbytes for failure in full.values() if failure.nbytes is not None]
        if not pieces or len(pieces) < len(full):
            return None
        sizes = {name: full[name].nbytes if name in full else self._size(name) for name in names}
        return RoomWanted(max(pieces), sum(size or 0 for size in sizes.values()), names)

    def _way(self, wanted: RoomWanted, slow: Collection[str]) -> InTheWay | None:
        return self._inner.in_the_way(wanted, slow=slow)

    def _size(self, name: str) -> int:
        """Bytes of an adapter as it was last; 0: not known."""
        try:
            return self._inner.get(AdapterRef(name)).bytes
        except AdapterNotFound:
            return 0

    async def load(self, order: LoadOrder) -> Loaded:
        """What an administrator loads is not ours to evict, and a name barred before is free."""
        loaded = await self._inner.load(order, make_room=self._make_room)
        self._mine.discard(order.name)
        self._barred.discard(order.name)
        self._refusals.pop(order.name, None)
        return loaded

    def unload(self, name: str) -> None:
        """The name is gone, and no request brings it back until it is loaded by `load`."""
        self._barred.add(name)
        self._mine.discard(name)
        self._inner.unload(name)

    async def revive(self, order: LoadOrder) -> None:
        await self._inner.revive(order)

    def claim(self, claims: Claims) -> None:
        """Names that are claimed are not looked for in the sources."""
        self._inner.claim(claims)
        self._claims = claims

    async def saved(self) -> None:
        await self._inner.saved()

    def pin(self, name: str, *, pinned: bool) -> AdapterInfo:
        return self._inner.pin(name, pinned=pinned)

    def acquire(self, terms: Sequence[NamedTerm]) -> Lease:
        return self._inner.acquire(terms)

    def get(self, ref: AdapterRef) -> AdapterInfo:
        return self._inner.get(ref)

    def list(self) -> Sequence[AdapterInfo]:
        return self._inner.list()

    def totals(self) -> AdapterTotals:
        return self._inner.totals()

    def _missing(self, name: str) -> bool:
        try:
            return self._inner.get(AdapterRef(name)).tier == "disk"
        except AdapterNotFound:
            return True

    async def _bring(self, name: str, tenant: str) -> Exception | None:
        """Have the name loaded; why not, else."""
        refused = self._refused(name)
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
            return _too_many_loads()
        began = self._clock()
        try:
            with self._loads.one(tenant):
                parked = self._inner.order_of(name) is not None
                if not parked and not await asyncio.to_thread(self._offers, name):
                    return self._refuse(name, SourceNotFound("no such source"))
                loaded = await self._fetch(name, parked=parked)
        except VersionConflict:
            return None  # somebody else loaded the name meanwhile
        except AdapterError as error:
            self._mine.discard(name)
            self._told("refused", self._clock() - began)
            return error if isinstance(error, ArenaFull) else self._refuse(name, error)
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
        self._mine.add(name)
        order = LoadOrder(name, name, if_version="")
        return await self._inner.load(order, make_room=self._make_room)

    def _refuse(self, name: str, error: AdapterError) -> AdapterError:
        """Remember the failure. What is forbidden looks like what is not there."""
        if isinstance(error, SourceForbidden | SourceNotFound | AdapterNotFound):
            error = AdapterNotFound.of(name)
        else:
            fields = {"adapter": name, "reason": str(error)}
            _log.warning("adapter not loaded on demand", extra={"fields": fields})
        passing = isinstance(error, ArenaFull | SourceUnavailable)
        until = self._clock() + (PASSING_SECONDS if passing else BROKEN_SECONDS)
        self._refusals[name] = _Refusal(type(error), str(error), until)
        self._refusals.move_to_end(name)
        while len(self._refusals) > MAX_REFUSALS:
            self._refusals.popitem(last=False)
        return error

    def _make_room(self) -> bool:
        """On the loader's thread: let go of one that nobody uses or waits for."""
        return self._evict(lambda name: not self._awaited[name])

    def _evict(self, may_go: Callable[[str], bool]) -> bool:
        gone = self._inner.evict(may_go, drops=lambda name: name in self._mine)
        if gone is None:
            return False
        self._mine.discard(gone)
        return True


def _too_many_loads() -> Overloaded:
    return Overloaded("Too many adapters are being loaded.", retry_after=2)


def _no_room() -> Overloaded:
    return Overloaded(
        "The adapters in use left no room for those of this request in time.", retry_after=5
    )
