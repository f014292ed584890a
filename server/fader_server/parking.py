"""Adapters that lost their place in memory but not their name: the tier below the host's.

A parked name keeps its version, its report and where it came from; a request, or a load by hand,
brings the same version back. Knows the adapters below as they answer, no files and no memory.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from fader_adapters.claims import Claims
from fader_adapters.errors import (
    AdapterNotFound,
    ArenaFull,
    NameReserved,
    SourceForbidden,
    SourceNotFound,
    SourceUnavailable,
    VersionConflict,
)
from fader_adapters.records import check_move
from fader_adapters.room import InTheWay, RoomWanted
from fader_server.api.adapter_ports import (
    AdapterInfo,
    Adapters,
    AdapterTotals,
    Lease,
    Loaded,
    LoadOrder,
)
from fader_server.api.blends import AdapterRef, NamedTerm

MayGo = Callable[[str], bool]


class Below(Adapters, Protocol):
    """The adapters in memory."""

    async def load(
        self, order: LoadOrder, *, make_room: Callable[[], bool] = lambda: False
    ) -> Loaded: ...

    def load_now(
        self, order: LoadOrder, *, make_room: Callable[[], bool] = lambda: False
    ) -> Loaded: ...

    def evict(self, may_go: MayGo) -> str | None: ...

    def in_the_way(
        self, wanted: RoomWanted, *, fixed: Collection[str] = (), slow: Collection[str] = ()
    ) -> InTheWay | None: ...

    def names(self) -> frozenset[str]: ...


@dataclass(frozen=True, slots=True)
class _Parked:
    order: LoadOrder
    """Brings the version back."""
    info: AdapterInfo
    """As it was, but for tier and leases."""


class Parking:
    """Adapters over those in memory. Belongs to the event loop, but for `evict`.

    A name is parked before it leaves memory, so who looks there first and here second finds it.
    What is parked of a name that came back is overwritten when it leaves again.
    """

    def __init__(self, inner: Below, *, fixed: frozenset[str], limit: int) -> None:
        """`fixed`: names that never leave memory, their sources cannot be read again.

        `limit`: names it remembers; those in memory have their own limit below.
        """
        self._inner = inner
        self._fixed = fixed
        self._limit = limit
        self._parked: dict[str, _Parked] = {}

    def order_of(self, name: str) -> LoadOrder | None:
        """What brings a name back into memory; None: it is there, or unknown."""
        parked = None if self._in_memory(name) else self._parked.get(name)
        return None if parked is None else parked.order

    def evict(self, may_go: MayGo, *, drops: MayGo = lambda name: False) -> str | None:
        """Take the longest unused name that may go out of memory; it is parked, or dropped.

        None when nothing may go. On any thread.
        """

        def park(name: str) -> bool:
            if name in self._fixed or not may_go(name):
                return False
            if not drops(name):
                info = self._inner.get(AdapterRef(name))
                order = LoadOrder(name, info.source, info.revision, sha256=info.version)
                self._parked[name] = _Parked(order, replace(info, tier="disk", retired=()))
            return True

        return self._inner.evict(park)

    def in_the_way(self, wanted: RoomWanted, *, slow: Collection[str] = ()) -> InTheWay | None:
        """Where room could be made once leases end; None: nowhere, whatever ends."""
        return self._inner.in_the_way(wanted, fixed=self._fixed, slow=slow)

    async def load(
        self, order: LoadOrder, *, make_room: Callable[[], bool] = lambda: False
    ) -> Loaded:
        """Raises what the load below raises, ArenaFull when too many names are registered."""
        parked = self._admit(order)
        if parked is not None and order.pin is None:
            order = replace(order, pin=parked.info.pinned)
        if parked is None or order.if_version is None:
            return self._arrived(parked, await self._inner.load(order, make_room=make_room))
        try:
            free = replace(order, if_version="")
            return self._arrived(parked, await self._inner.load(free, make_room=make_room))
        except VersionConflict:
            if not self._in_memory(order.name):
                raise
        loaded = await self._inner.load(order, make_room=make_room)  # it came back meanwhile
        return self._arrived(None, loaded)

    async def bring(self, name: str, *, make_room: Callable[[], bool]) -> Loaded | None:
        """Load a parked version again; None: it is there already. Raises AdapterError.

        SourceUnavailable when its source holds another version now, or none: the name is
        registered, whatever became of its files.
        """
        order = self.order_of(name)
        if order is None:
            return None
        try:
            return await self.load(replace(order, if_version=order.sha256), make_room=make_room)
        except VersionConflict:
            if self._in_memory(name):
                return None  # somebody else moved the name meanwhile
            raise SourceUnavailable(
                f"the files of {name!r} changed since it was loaded; load it anew"
            ) from None
        except (SourceForbidden, SourceNotFound) as error:
            raise SourceUnavailable(
                f"the files of {name!r} cannot be found again: {error}; put them back, or unload it"
            ) from None

    def load_now(self, order: LoadOrder) -> Loaded:
        """The same at start, on the caller's thread: who came before makes room."""
        return self._arrived(
            self._admit(order),
            self._inner.load_now(order, make_room=lambda: self.evict(lambda _: True) is not None),
        )

    def unload(self, name: str) -> None:
        """The name is gone at once, wherever it was. Raises AdapterNotFound."""
        try:
            self._inner.unload(name)
        except AdapterNotFound:
            if self._parked.pop(name, None) is None:
                raise
        self._parked.pop(name, None)

    def pin(self, name: str, *, pinned: bool) -> AdapterInfo:
        """A parked name stays where it is and is pinned from its next load on."""
        try:
            return self._inner.pin(name, pinned=pinned)
        except AdapterNotFound:
            parked = self._parked.get(name)
            if parked is None:
                raise
        info = replace(parked.info, pinned=pinned)
        self._parked[name] = _Parked(replace(parked.order, pin=pinned), info)
        return info

    def get(self, ref: AdapterRef) -> AdapterInfo:
        try:
            return self._inner.get(ref)
        except AdapterNotFound:
            parked = self._parked.get(ref.name)
            if parked is None or not parked.info.version.startswith(ref.version or ""):
                raise
            if self._in_memory(ref.name):
                raise
            return parked.info

    def list(self) -> Sequence[AdapterInfo]:
        found = {info.name: info for info in self._inner.list()}
        found = {name: one.info for name, one in self._parked.copy().items()} | found
        return [found[name] for name in sorted(found)]

    def totals(self) -> AdapterTotals:
        names = self._inner.names().union(self._parked.copy())
        return replace(self._inner.totals(), adapters=len(names))

    def acquire(self, terms: Sequence[NamedTerm]) -> Lease:
        return self._inner.acquire(terms)

    async def lease(self, terms: Sequence[NamedTerm], *, tenant: str = "") -> Lease:
        return await self._inner.lease(terms, tenant=tenant)

    async def revive(self, order: LoadOrder) -> None:
        await self._inner.revive(order)

    def claim(self, claims: Claims) -> None:
        """Names that are parked are taken too. Raises NameReserved."""
        taken = sorted(claims.names & self._parked.keys())
        if taken:
            raise NameReserved(f"{taken[0]!r} is the name of an adapter; choose another")
        self._inner.claim(claims)

    async def saved(self) -> None:
        await self._inner.saved()

    def _in_memory(self, name: str) -> bool:
        try:
            self._inner.get(AdapterRef(name))
        except AdapterNotFound:
            return False
        return True

    def _admit(self, order: LoadOrder) -> _Parked | None:
        """The parked version that the order would replace. Raises as a load below would."""
        if self._in_memory(order.name):
            return None
        parked = self._parked.get(order.name)
        if parked is None:
            if len(self._parked) >= self._limit:
                raise ArenaFull(f"{self._limit} adapters are known, the limit; unload one first")
            return None
        check_move(
            order.name, parked.info.version, replace=order.replace, if_version=order.if_version
        )
        return parked

    def _arrived(self, parked: _Parked | None, loaded: Loaded) -> Loaded:
        if parked is not None and loaded.replaced is None:
            return replace(loaded, replaced=parked.info.version)
        return loaded
