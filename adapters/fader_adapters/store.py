"""Names, versions and leases of adapters in host memory. No I/O, never waits; one caller at a time.

A version's life: reserved → current under one or more names → retired (no name, but leased or
claimed) → leaving (`on_retired` was called: the device shall forget it) → reclaimed (memory free).
"""

from collections.abc import Callable, Collection, Sequence

from fader_adapters.books import Books
from fader_adapters.claims import Claims
from fader_adapters.errors import (
    ArenaFull,
    BlendInvalid,
    NameReserved,
)
from fader_adapters.leases import AdapterRef, HostAdapter, Lease, Reservation
from fader_adapters.parse import ParsedAdapter
from fader_adapters.records import (
    NameRecord,
    VersionRecord,
    check_move,
    check_name,
    check_version,
    check_weight,
)
from fader_adapters.room import InTheWay, RoomWanted
from fader_adapters.spec import Blend, Digest, Term, added_up
from fader_adapters.tiers import HostTier

_SLOW = 1 << 32
"""What the leases of a slow name count beside those of others."""


class Store(Books):
    """The host tier's books. Not thread-safe: whoever asks on several threads holds a lock."""

    def __init__(
        self,
        tier: HostTier,
        *,
        on_retired: Callable[[Digest], None],
        max_adapters: int = 1024,
        max_terms: int = 8,
    ) -> None:
        """`on_retired(version)` is called when nothing names, leases or claims a version any more.

        Its memory stays until `reclaim(version)` answers that the device has forgotten it.
        """
        super().__init__()
        self._tier = tier
        self._on_retired = on_retired
        self._max_adapters = max_adapters
        self._max_terms = max_terms
        self._leases = 0

    @property
    def leases(self) -> int:
        """Leases not yet released."""
        return self._leases

    @property
    def used_bytes(self) -> int:
        return self._tier.used_bytes

    @property
    def total_bytes(self) -> int:
        return self._tier.total_bytes

    def reserve(self, parsed: ParsedAdapter) -> Reservation:
        """Room for a version; shared when it is here already. Then: fill, publish or cancel.

        Raises AdapterTooLarge (never) or ArenaFull (not now).
        """
        entry = self._versions.get(parsed.spec.version)
        if entry is not None:
            entry.reservations += 1
            return Reservation(parsed, entry.adapter.flat, shared=True, give_back=self._cancel)
        flat = self._tier.allocate(parsed.spec.numel)
        if flat is None:
            raise ArenaFull(
                f"the adapter needs {parsed.nbytes} bytes in one piece, {self.used_bytes} of "
                f"{self.total_bytes} are in use; unload an adapter or wait for its last request"
                + (", or delete recipes that keep versions" if self._claims.versions else ""),
                nbytes=parsed.nbytes,
            )
        return Reservation(parsed, flat, shared=False, give_back=self._cancel)

    def in_the_way(
        self, wanted: RoomWanted, *, fixed: Collection[str] = (), slow: Collection[str] = ()
    ) -> InTheWay | None:
        """Where room could be made once leases end. None: nowhere, whatever ends.

        fixed  names that stay, as pinned and claimed ones do
        slow   names whose leases are not expected to end soon: other places are better
        """
        going = [entry for entry in self._versions.values() if self._may_go(entry, fixed)]
        room = self.total_bytes - self.used_bytes + sum(entry.adapter.nbytes for entry in going)
        most = sum(len(entry.names) for entry in going)
        if room < wanted.total or len(self._names) - most + len(wanted.names) > self._max_adapters:
            return None
        beside = [entry for entry in going if wanted.names.isdisjoint(entry.names)]
        return (
            self._cheapest(wanted.piece, beside, slow)
            or self._cheapest(wanted.total, going, slow)  # its own lie in the way: all anew
            or self._cheapest(wanted.piece, going, slow)
        )

    def _cheapest(
        self, piece: int, going: Sequence[VersionRecord], slow: Collection[str]
    ) -> InTheWay | None:
        """What of `going` takes the room for a piece, or for one more name."""
        costs = [
            entry.leases + (_SLOW if entry.leases and not entry.labels.isdisjoint(slow) else 0)
            for entry in going
        ]
        if piece:
            flats = [entry.adapter.flat for entry in going]
            found = self._tier.clearing(piece, list(zip(flats, costs, strict=True)))
        else:
            named = [index for index, entry in enumerate(going) if entry.names]
            found = [min(named, key=lambda index: costs[index])] if named else None
        if found is None:
            return None
        there = [going[index] for index in found]
        names = frozenset(name for entry in there for name in entry.labels)
        return InTheWay(names, sum(entry.leases for entry in there))

    def _may_go(self, entry: VersionRecord, fixed: Collection[str]) -> bool:
        """Whether only leases, if anything, hold the version and its names in memory."""
        if entry.kept or entry.reservations:
            return False
        return not any(name in fixed or self._stays(name) for name in entry.names)

    def publish(
        self,
        name: str,
        reservation: Reservation,
        *,
        replace: bool = False,
        if_version: str | None = None,
        pin: bool | None = None,
    ) -> HostAdapter:
        """Let `name` mean the reserved version from now on; running leases keep theirs.

        `pin` None leaves it as it is, and a new name without one. `if_version` asks that the name
        is at this version (12 or more hex digits), or free for "".
        Raises AdapterInvalid (the name), AdapterExists, NameReserved, VersionConflict, ArenaFull
        (too many names); the reservation stays open then.
        """
        assert reservation.open
        assert reservation.filled
        record = self._names.get(name)
        check_name(name)
        self.check_move(name, replace=replace, if_version=if_version)
        if record is None and len(self._names) >= self._max_adapters:
            raise ArenaFull(
                f"{len(self._names)} adapters are loaded, the limit; unload one first", nbytes=0
            )
        entry = self._settle_reservation(reservation)
        old = self._versions[record.version] if record is not None else None
        if record is None:
            record = self._names[name] = NameRecord(entry.adapter.version, pinned=False)
        record.version = entry.adapter.version
        self._names.move_to_end(name)
        record.pinned = record.pinned if pin is None else pin
        entry.names.add(name)
        entry.former.discard(name)
        record.former.discard(record.version)
        self._keep_if_claimed(entry, name)
        if old is not None and old is not entry:
            old.names.discard(name)
            self._note_former(old, name)
            self._retire_unwanted(old)
        return entry.adapter

    def check_move(self, name: str, *, replace: bool, if_version: str | None) -> None:
        """What `publish` would say of the name at once. Raises NameReserved, VersionConflict,
        AdapterExists."""
        self.check_unclaimed(name)
        check_move(name, self._current(name), replace=replace, if_version=if_version)

    def adopt(self, name: str, reservation: Reservation) -> None:
        """Take a claimed version in as an earlier one of the name, which stays where it is.

        Raises AdapterNotFound, and the reservation stays open then.
        """
        assert reservation.open
        assert reservation.filled
        record = self._record(name)
        entry = self._settle_reservation(reservation)
        if entry.adapter.version != record.version:
            self._note_former(entry, name)
        self._keep_if_claimed(entry, name)
        self._retire_unwanted(entry)

    def claim(self, claims: Claims) -> None:
        """Replace what is claimed; versions that nothing holds any more go.

        Raises NameReserved when an adapter has a name that is claimed, and nothing changes.
        """
        for name in sorted(claims.names & self._names.keys()):
            raise NameReserved(f"{name!r} is the name of an adapter; choose another")
        before, self._claims = self._claims, claims
        for name, version in claims.versions - before.versions:
            if name in self._names and version in self.known_versions(name):
                self._keep_if_claimed(self._versions[version], name)
        for name, version in before.versions - claims.versions:
            entry = self._versions.get(version)
            if entry is None or name not in entry.kept:
                continue
            entry.kept.discard(name)
            self._retire_unwanted(entry)

    def unload(self, name: str, if_version: str | None = None) -> None:
        """Forget the name and its claims at once; its versions go when their last lease ends.

        Raises AdapterNotFound, VersionConflict.
        """
        versions = self.known_versions(name)
        check_version(name, self._current(name), if_version)
        del self._names[name]
        for entry in [self._versions[version] for version in versions]:
            was_wanted = entry.wanted
            for names in (entry.names, entry.former, entry.kept):
                names.discard(name)
            if was_wanted:
                self._retire_unwanted(entry)

    def pin(self, name: str, *, pinned: bool) -> None:
        """Exempt the name from `idle`, or not. Raises AdapterNotFound."""
        self._record(name).pinned = pinned

    def acquire(self, refs: Sequence[AdapterRef]) -> Lease:
        """Resolve every name and lease every version, in one step; no refs: the base.

        Terms of weight 0 are checked and dropped, weights of names that mean one version added
        up. Raises AdapterNotFound, BlendInvalid.
        """
        if len(refs) > self._max_terms:
            raise BlendInvalid(f"a blend has at most {self._max_terms} terms, got {len(refs)}")
        terms = [self._resolve(ref) for ref in refs]
        if len({(term.name, term.version) for term in terms}) < len(terms):
            raise BlendInvalid("an adapter stands twice in the blend; add its weights")
        gammas = added_up(terms)
        for gamma in gammas.values():
            check_weight(gamma)
        blend = Blend.of(Term(version, gamma) for version, gamma in gammas.items())
        kept = tuple(term for term in terms if term.weight != 0.0 and gammas[term.version] != 0.0)
        entries = [self._versions[term.version] for term in blend.terms]
        for entry in entries:
            entry.leases += 1
        for term in kept:
            self._names.move_to_end(term.name)
        self._leases += 1
        adapters = {entry.adapter.version: entry.adapter for entry in entries}
        return Lease(blend, adapters, kept, lambda: self._release(entries))

    def reclaim(self, version: Digest) -> None:
        """The device has forgotten the version, once for each `on_retired`; frees its memory.

        A version that was published again meanwhile, or retired again, stays.
        """
        entry = self._versions[version]
        entry.forgets -= 1
        assert entry.forgets >= 0
        self._leaving -= not entry.forgets
        if not entry.wanted and not entry.forgets:
            del self._versions[version]
            for name in entry.former:
                self._names[name].former.discard(version)
            self._tier.free(entry.adapter.flat)

    def _note_former(self, entry: VersionRecord, name: str) -> None:
        entry.former.add(name)
        self._names[name].former.add(entry.adapter.version)

    def _keep_if_claimed(self, entry: VersionRecord, name: str) -> None:
        if (name, entry.adapter.version) in self._claims.versions:
            entry.kept.add(name)

    def _settle_reservation(self, reservation: Reservation) -> VersionRecord:
        """The version a reservation now belongs to, created unless it is here already."""
        entry = self._versions.get(reservation.version)
        if reservation.shared:
            assert entry is not None
            entry.reservations -= 1
        elif entry is not None:  # the same content was published while this one was being filled
            self._tier.free(reservation.flat)
        else:
            parsed = reservation.parsed
            entry = VersionRecord(HostAdapter(parsed.spec, reservation.flat, parsed.report))
            self._versions[reservation.version] = entry
        reservation.close()
        return entry

    def _cancel(self, reservation: Reservation) -> None:
        if not reservation.shared:
            self._tier.free(reservation.flat)
            return
        entry = self._versions[reservation.version]
        entry.reservations -= 1
        self._retire_unwanted(entry)

    def _release(self, entries: Sequence[VersionRecord]) -> None:
        self._leases -= 1
        for entry in entries:
            entry.leases -= 1
        for entry in entries:
            self._retire_unwanted(entry)

    def _retire_unwanted(self, entry: VersionRecord) -> None:
        if not entry.wanted:
            self._leaving += not entry.forgets
            entry.forgets += 1
            self._on_retired(entry.adapter.version)
