"""The adapters of one server: keeps the store's books, tells the engine.

The store is not thread-safe; a lock lets the event loop lease while the reader's thread publishes.
Reading, hashing and checking files happen outside it.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from fader_adapters.claims import Claims
from fader_adapters.errors import ArenaFull
from fader_adapters.inspection import Inspector
from fader_adapters.leases import AdapterRef as StoreRef
from fader_adapters.leases import Lease, Reservation
from fader_adapters.parse import ParsedAdapter
from fader_adapters.pool import Pool
from fader_adapters.records import AdapterStatus
from fader_adapters.room import InTheWay, RoomWanted
from fader_adapters.roots import Found
from fader_adapters.source import RawAdapter
from fader_adapters.sources import Sources
from fader_adapters.spec import Digest
from fader_adapters.store import Store
from fader_adapters.tiers import HostTier
from fader_server.api.adapter_ports import AdapterInfo, AdapterTotals, Loaded, LoadOrder
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.pacing import Pace
from fader_server.reading import Facts, Reader

Forget = Callable[[Digest, Callable[[], None]], None]
"""Ask the engine to drop a version from the device, then call back, on any thread."""
MakeRoom = Callable[[], bool]
"""Unload something that may go; False when there is nothing. Called on the loader's thread."""

_LEAVING_SECONDS = 5.0
"""How long a load waits for memory that the device is about to give back."""


class Registry:
    """Implements the API's Adapters. Everything but `load_now` and `load_trusted` is immediate."""

    def __init__(
        self,
        inspector: Inspector,
        *,
        tier: HostTier,
        pool: Pool,
        sources: Sources,
        forget: Forget,
        max_terms: int,
        max_adapters: int,
        fetch_timeout: float,
        require_sha256: bool = False,
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """`busy`: whether requests run, so that loads should go slowly."""
        self._reader = Reader(
            inspector, sources, fetch_timeout=fetch_timeout, require_sha256=require_sha256
        )
        self._pool = pool
        self._forget = forget
        self._busy = busy
        self._lock = threading.RLock()
        self._freed = threading.Condition(self._lock)
        self._evictions = 0
        self._facts: dict[str, dict[Digest, Facts]] = {}
        self._store = Store(
            tier, on_retired=self._retired, max_terms=max_terms, max_adapters=max_adapters
        )

    def acquire(self, terms: Sequence[NamedTerm]) -> "LockedLease":
        """Resolve names and take the lease in one step. Raises AdapterNotFound, BlendInvalid."""
        refs = [StoreRef(term.ref.name, term.ref.version, term.weight) for term in terms]
        with self._lock:
            return LockedLease(self._store.acquire(refs), self._lock)

    async def lease(self, terms: Sequence[NamedTerm], *, tenant: str = "") -> "LockedLease":
        """The same: what is not loaded is not there, and nobody waits."""
        return self.acquire(terms)

    async def load(self, order: LoadOrder, *, make_room: MakeRoom = lambda: False) -> Loaded:
        """Fetch what a client named, check it and let the name mean it. Raises AdapterError.

        One at a time, on a thread of its own, downloads before that a few at a time; the event
        loop and the engine go on. `make_room` is called while the adapter does not fit. Name and
        version are compared before anything is read, and again at publication.
        """
        with self._lock:
            self._store.check_move(order.name, replace=order.replace, if_version=order.if_version)
        raw = await self._reader.fetch(order)
        return await self._reader.run(self._publish, raw, order, make_room)

    async def revive(self, order: LoadOrder) -> None:
        """The same for a claimed version; the name stays where it is. Raises AdapterNotFound."""
        raw = await self._reader.fetch(order)
        await self._reader.run(self._adopt, raw, order)

    def load_now(self, order: LoadOrder, *, make_room: MakeRoom = lambda: False) -> Loaded:
        """The same on the caller's thread, at start; needs no sha256."""
        return self._publish(self._reader.fetch_now(order), order, make_room)

    def load_trusted(self, name: str, source: str) -> Loaded:
        """The same for what the operator named. Raises AdapterError."""
        return self._publish(self._reader.fetch_trusted(source), LoadOrder(name, source))

    def discover(self) -> list[Found]:
        """Every adapter directly under the roots. Raises OSError."""
        return self._reader.discover()

    def evict(self, may_go: Callable[[str], bool]) -> str | None:
        """Unload the longest unused name that may go; leased and pinned ones never do."""
        with self._lock:
            for name in self._store.idle():
                if may_go(name):
                    self.unload(name)
                    self._evictions += 1
                    return name
        return None

    def in_the_way(
        self, wanted: RoomWanted, *, fixed: Collection[str] = (), slow: Collection[str] = ()
    ) -> InTheWay | None:
        """Where room could be made once leases end: see Store.in_the_way."""
        with self._lock:
            return self._store.in_the_way(wanted, fixed=fixed, slow=slow)

    def unload(self, name: str) -> None:
        """The name is gone at once, its memory with its last lease. Raises AdapterNotFound."""
        with self._lock:
            self._store.unload(name)
            self._facts.pop(name, None)

    def pin(self, name: str, *, pinned: bool) -> AdapterInfo:
        """Raises AdapterNotFound."""
        with self._lock:
            self._store.pin(name, pinned=pinned)
            return self._info(self._store.status(name))

    def claim(self, claims: Claims) -> None:
        """Replace what recipes claim. Raises NameReserved."""
        with self._lock:
            self._store.claim(claims)

    async def saved(self) -> None:
        """Nothing to wait for: who writes changes down stands above."""

    def get(self, ref: AdapterRef) -> AdapterInfo:
        """Raises AdapterNotFound, also for a version that the name does not mean or hold."""
        with self._lock:
            return self._info(self._store.status(ref.name, ref.version))

    def names(self) -> frozenset[str]:
        """Every name in memory."""
        with self._lock:
            return frozenset(self._facts)

    def list(self) -> Sequence[AdapterInfo]:
        with self._lock:
            return [self._info(status) for status in self._store.list()]

    def totals(self) -> AdapterTotals:
        with self._lock:
            each = self._store.used_bytes // max(1, self._store.versions)
            return AdapterTotals(
                adapters=len(self._facts),
                leases=self._store.leases,
                host_bytes=self._store.used_bytes,
                device_bytes=self._pool.resident_bytes,
                host_evictions=self._evictions,
                device_evictions=self._pool.evictions,
                slots=self._pool.total_bytes // each if each else 1,
            )

    def _publish(
        self, raw: RawAdapter, order: LoadOrder, make_room: MakeRoom = lambda: False
    ) -> Loaded:
        with self._filled(raw, order, make_room) as (reservation, facts):
            return self._name(reservation, order, facts, make_room)

    def _adopt(self, raw: RawAdapter, order: LoadOrder) -> None:
        with self._filled(raw, order, lambda: False) as (reservation, facts), self._lock:
            self._store.adopt(order.name, reservation)
            self._note(order.name, reservation.version, facts)

    @contextmanager
    def _filled(
        self, raw: RawAdapter, order: LoadOrder, make_room: MakeRoom
    ) -> Iterator[tuple[Reservation, Facts]]:
        """Room with the checked weights in it, given back unless it was published or adopted."""
        pace = Pace(self._busy)
        parsed, facts = self._reader.check(raw, order, pace)
        reservation = self._reserve(parsed, make_room)
        try:
            reservation.fill(pace)
            yield reservation, facts
        finally:
            with self._lock:
                reservation.cancel()  # nothing, once it has an owner

    def _reserve(self, parsed: ParsedAdapter, make_room: MakeRoom) -> Reservation:
        """Room for a version, after what leaves has left and what may go is gone."""
        until = time.monotonic() + _LEAVING_SECONDS
        with self._freed:
            while True:
                try:
                    return self._store.reserve(parsed)
                except ArenaFull:
                    leaving = self._store.leaving
                    if leaving and self._freed.wait(max(0.0, until - time.monotonic())):
                        continue
                    if not make_room():
                        raise

    def _name(
        self, reservation: Reservation, order: LoadOrder, facts: Facts, make_room: MakeRoom
    ) -> Loaded:
        with self._lock:
            before = order.name in self._facts
            replaced = self._store.status(order.name).version if before else None
            publish = partial(
                self._store.publish,
                order.name,
                reservation,
                replace=order.replace,
                if_version=order.if_version,
                pin=order.pin,
            )
            while True:
                try:
                    publish()
                    break
                except ArenaFull:
                    if not make_room():
                        raise
            self._note(order.name, reservation.version, facts)
            return Loaded(self._info(self._store.status(order.name)), replaced)

    def _note(self, name: str, version: Digest, facts: Facts) -> None:
        """Remember where a version came from; forget those that are gone."""
        known = self._facts.get(name, {}) | {version: facts}
        alive = self._store.known_versions(name)
        self._facts[name] = {kept: known[kept] for kept in known if kept in alive}

    def _retired(self, version: Digest) -> None:
        self._forget(version, lambda: self._reclaim(version))

    def _reclaim(self, version: Digest) -> None:
        with self._freed:
            self._store.reclaim(version)
            self._freed.notify_all()

    def _info(self, status: AdapterStatus) -> AdapterInfo:
        report, facts = status.report, self._facts[status.name][status.version]
        return AdapterInfo(
            name=status.name,
            version=status.version,
            rank=max(report.ranks),
            scales=report.scales,
            modules=report.matched,
            targets=report.targets,
            bytes=status.nbytes,
            tier="device" if status.version in self._pool else "host",
            leases=status.leases,
            pinned=status.pinned,
            retired=status.retired,
            health=facts.health,
            source=facts.source,
            revision=facts.revision,
            created=facts.created,
        )


class LockedLease:
    """A lease whose release takes the registry's lock. Release is idempotent."""

    def __init__(self, lease: Lease, lock: "threading.RLock") -> None:
        self._lease = lease
        self._lock = lock
        self.blend = lease.blend
        self.adapters = lease.adapters
        self.terms = lease.terms

    def release(self) -> None:
        with self._lock:
            self._lease.release()
