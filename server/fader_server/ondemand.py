"""Adapters that load when a request needs them. Knows names and errors, no files.

What is not in memory comes back when it is asked for: what was loaded before always, new names
where sources offer them. When room is needed the longest unused leaves, never what is in use.
"""

import asyncio
import copy
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Protocol

from fader_adapters.claims import Claims
from fader_adapters.errors import AdapterError, AdapterNotFound, ArenaFull
from fader_adapters.room import InTheWay, RoomWanted
from fader_server.api.adapter_ports import (
    AdapterInfo,
    Adapters,
    AdapterTotals,
    Lease,
    Loaded,
    LoadOrder,
    stands,
)
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.bringing import Bringing, LoadsByName
from fader_server.errors import Overloaded
from fader_server.room import Counted, Line

MAX_ATTEMPTS = 5
"""Loads into room that seemed to be there, until its request is told to come again."""


class Loader(LoadsByName, Adapters, Protocol):
    """The adapters below: they load when they are told to, and can make room."""

    async def load(
        self, order: LoadOrder, *, make_room: Callable[[], bool] = lambda: False
    ) -> Loaded: ...

    def unload(self, name: str) -> None: ...

    def evict(
        self, may_go: Callable[[str], bool], *, drops: Callable[[str], bool]
    ) -> str | None: ...

    def in_the_way(self, wanted: RoomWanted, *, slow: Collection[str] = ()) -> InTheWay | None: ...


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
        """`offers`: see Bringing; `told` hears of every load. A request waits `room_seconds` for
        leases of others to end where its adapters need the room, and at most `max_waiting`
        requests do, each of them within `counted`.
        """
        self._inner = inner
        self._told = told
        self._clock = clock
        self._bringing = Bringing(
            inner, offers=offers, make_room=self._make_room, told=told, clock=clock
        )
        self._awaited: Counter[str] = Counter()
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
                failures = await asyncio.gather(
                    *(self._bringing.bring(name, tenant) for name in missing)
                )
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
            self._bringing.refuse(missing[0], full[missing[0]])
        raise copy.copy(full[next(iter(full))])

    async def _exist(self, names: frozenset[str], tenant: str) -> bool:
        """Whether each is known, or a source of it may exist: others are refused without a wait."""
        strange = [
            name for name in names if self._missing(name) and self._inner.order_of(name) is None
        ]
        for name in strange:
            known = self._bringing.refused(name)
            if known is not None or not await self._bringing.offered(name, tenant):
                return False
        return True

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
        with self._counted():
            loaded = await self._inner.load(order, make_room=self._make_room)
        if stands(loaded, self._inner):  # else a name that was unloaded meanwhile stays barred
            self._bringing.free(order.name)
        return loaded

    def unload(self, name: str) -> None:
        """The name is gone, and no request brings it back until it is loaded by `load`."""
        self._bringing.bar(name)
        self._inner.unload(name)

    async def revive(self, order: LoadOrder) -> None:
        with self._counted():
            await self._inner.revive(order)

    def claim(self, claims: Claims) -> None:
        self._inner.claim(claims)
        self._bringing.claim(claims)

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

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """A load by an administrator, a folder that changed or a restart."""
        began = self._clock()
        try:
            yield
        except AdapterError:
            self._told("refused", self._clock() - began)
            raise
        self._told("ok", self._clock() - began)

    def _missing(self, name: str) -> bool:
        try:
            return self._inner.get(AdapterRef(name)).tier == "disk"
        except AdapterNotFound:
            return True

    def _make_room(self) -> bool:
        """On the loader's thread: let go of one that nobody uses or waits for."""
        return self._evict(lambda name: not self._awaited[name])

    def _evict(self, may_go: Callable[[str], bool]) -> bool:
        gone = self._inner.evict(may_go, drops=lambda name: name in self._bringing.mine)
        if gone is None:
            return False
        self._bringing.mine.discard(gone)
        return True


def _no_room() -> Overloaded:
    return Overloaded(
        "The adapters in use left no room for those of this request in time.", retry_after=5
    )
