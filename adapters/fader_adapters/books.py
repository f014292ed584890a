"""The store's books as they are read: what names mean, who holds a version, what is claimed.

No I/O. Changes nothing; not thread-safe.
"""

from collections import OrderedDict
from collections.abc import Iterator

from fader_adapters.claims import NONE
from fader_adapters.errors import AdapterNotFound, NameReserved
from fader_adapters.leases import AdapterRef, LeasedTerm
from fader_adapters.records import (
    AdapterStatus,
    NameRecord,
    VersionRecord,
    check_weight,
)
from fader_adapters.spec import DIGEST_PREFIX, Digest


class Books:
    """Names, versions and claims; the store is the one who writes them."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, NameRecord] = OrderedDict()
        """Longest unused first: neither leased nor published."""
        self._versions: dict[Digest, VersionRecord] = {}
        self._claims = NONE
        self._leaving = 0

    @property
    def versions(self) -> int:
        """Versions in memory: current, retired and leaving."""
        return len(self._versions)

    @property
    def leaving(self) -> int:
        """Versions that the device was told to forget and has not yet. Then their memory is free,
        unless they were published again meanwhile."""
        return self._leaving

    def status(self, name: str, version: str | None = None) -> AdapterStatus:
        """The name's current version, or one that `acquire` would find. Raises AdapterNotFound."""
        found = self._resolve(AdapterRef(name, version)).version
        record, entry = self._names[name], self._versions[found]
        return AdapterStatus(
            name=name,
            version=found,
            report=entry.adapter.report,
            nbytes=entry.adapter.nbytes,
            leases=entry.leases,
            pinned=record.pinned,
            retired=tuple(sorted(v for v in record.former if self._versions[v].retired_from(name))),
        )

    def list(self) -> tuple[AdapterStatus, ...]:
        """Every name, sorted."""
        return tuple(self.status(name) for name in sorted(self._names))

    def known_versions(self, name: str) -> frozenset[Digest]:
        """Versions in memory that the name means or meant. Raises AdapterNotFound."""
        record = self._record(name)
        return frozenset((record.version, *record.former))

    def idle(self) -> Iterator[str]:
        """Names that could be unloaded to make room, longest unused first: no lease, no pin and
        no claim on any of their versions. Change nothing while this is read."""
        for name, record in self._names.items():
            if not self._versions[record.version].leases and not self._stays(name):
                yield name

    def _stays(self, name: str) -> bool:
        """Whether a pin or a claim keeps the name in memory."""
        record = self._names[name]
        return record.pinned or any(
            name in self._versions[version].kept for version in (record.version, *record.former)
        )

    def check_unclaimed(self, name: str) -> None:
        """What `publish` would say of the name at once. Raises NameReserved."""
        if name in self._claims.names:
            raise NameReserved(f"{name!r} is the name of the base or a recipe; choose another")

    def _record(self, name: str) -> NameRecord:
        record = self._names.get(name)
        if record is None:
            raise AdapterNotFound.of(name)
        return record

    def _current(self, name: str) -> str:
        """The version of a name, "" when it is free."""
        record = self._names.get(name)
        return record.version if record is not None else ""

    def _resolve(self, ref: AdapterRef) -> LeasedTerm:
        check_weight(ref.weight)
        record = self._record(ref.name)
        if ref.version is None:
            return LeasedTerm(ref.name, record.version, ref.weight)
        live = [
            version
            for version in (record.version, *record.former)
            if version.startswith(ref.version)
            and (version == record.version or self._versions[version].retired_from(ref.name))
        ]
        if not DIGEST_PREFIX.fullmatch(ref.version) or len(live) != 1:
            raise AdapterNotFound(
                f"no live version {ref.version[:64]!r} of adapter {ref.name!r}; it is at "
                f"{record.version[:12]}"
            )
        return LeasedTerm(ref.name, live[0], ref.weight)
