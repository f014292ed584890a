"""What the API needs of adapters: leases, loads and what is told of them. Knows no store."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from fader_adapters.claims import Claims
from fader_adapters.errors import AdapterNotFound
from fader_adapters.report import Health
from fader_adapters.spec import AdapterData, Blend, Digest
from fader_server.api.blends import AdapterRef, NamedTerm

Tier = Literal["disk", "host", "device"]


class LeasedTerm(Protocol):
    """One adapter of a running call, resolved."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> Digest: ...
    @property
    def weight(self) -> float: ...


class Lease(Protocol):
    """A call's hold on the versions it uses. Release is idempotent."""

    @property
    def blend(self) -> Blend: ...
    @property
    def adapters(self) -> Mapping[Digest, AdapterData]: ...
    @property
    def terms(self) -> Sequence[LeasedTerm]: ...

    def release(self) -> None: ...


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """What an administrator asks to load under a name."""

    name: str
    source: str
    revision: str | None = None
    sha256: str | None = None
    replace: bool = True
    """Swap a name that is taken; else AdapterExists."""
    if_version: str | None = None
    """Only swap from this version; "" asks that the name is free."""
    pin: bool | None = None
    """None: as it is; a new name has no pin."""


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """The health report of one adapter."""

    name: str
    version: Digest
    rank: int
    """The largest of its modules."""
    scales: tuple[float, ...]
    modules: int
    """Linears of the base that it changes."""
    targets: tuple[str, ...]
    bytes: int
    tier: Tier
    leases: int
    pinned: bool
    retired: tuple[Digest, ...] = ()
    """Earlier versions that requests or recipes still hold."""
    health: Health | None = None
    """What the load found."""
    source: str = ""
    revision: str | None = None
    """The commit a Hub source meant when it was loaded."""
    created: int = 0
    """Unix seconds of the load."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load did."""

    info: AdapterInfo
    replaced: Digest | None
    """The version the name had before, if any."""


@dataclass(frozen=True, slots=True)
class AdapterTotals:
    """The store and the pool in numbers."""

    adapters: int = 0
    leases: int = 0
    host_bytes: int = 0
    device_bytes: int = 0
    host_evictions: int = 0
    device_evictions: int = 0
    slots: int = 0
    """Adapters the device can hold at once, when they are as large as those there are."""


class Adapters(Protocol):
    """The adapters of this server. Every method belongs to the event loop; none blocks it."""

    def acquire(self, terms: Sequence[NamedTerm]) -> Lease:
        """Resolve names and take the lease in one step. No terms: the base.

        Raises AdapterNotFound or BlendInvalid.
        """
        ...

    async def lease(self, terms: Sequence[NamedTerm], *, tenant: str = "") -> Lease:
        """The same, after loading what is missing where that is allowed; waits for room, in which
        tenants take turns.

        Raises AdapterError, Overloaded, TenantBusy.
        """
        ...

    async def load(self, order: LoadOrder) -> Loaded:
        """Fetch, check and publish; the name moves at once or not at all.

        Raises AdapterError: AdapterInvalid, AdapterMismatch, AdapterTooLarge, ArenaFull,
        AdapterExists, NameReserved, VersionConflict, SourceForbidden, SourceNotFound,
        SourceUnavailable.
        """
        ...

    async def revive(self, order: LoadOrder) -> None:
        """Fetch a version that is claimed, as an earlier one of a name that stays where it is.

        `order.sha256` is the version. Raises AdapterError as `load` does, AdapterNotFound when
        the name is not loaded.
        """
        ...

    def claim(self, claims: Claims) -> None:
        """Replace what recipes claim: names for no adapter, versions that outlive a swap.

        Raises NameReserved when an adapter has such a name, and nothing changes.
        """
        ...

    async def saved(self) -> None:
        """Return when every change so far would survive the end of the process."""
        ...

    def unload(self, name: str) -> None:
        """The name is gone at once. Raises AdapterNotFound."""
        ...

    def pin(self, name: str, *, pinned: bool) -> AdapterInfo: ...

    def get(self, ref: AdapterRef) -> AdapterInfo:
        """The name's current version, or the earlier one that is asked for and still held.

        Raises AdapterNotFound.
        """
        ...

    def list(self) -> Sequence[AdapterInfo]: ...

    def totals(self) -> AdapterTotals: ...


def stands(loaded: Loaded, adapters: Adapters) -> bool:
    """Whether the name still means what the load made it mean: it may have been unloaded or moved
    on between the load's publication and its return."""
    try:
        return adapters.get(AdapterRef(loaded.info.name)).version == loaded.info.version
    except AdapterNotFound:
        return False
