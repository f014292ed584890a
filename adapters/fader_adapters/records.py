"""The store's books: one record a name, one a version, and what may stand in them. No behaviour."""

import math
from dataclasses import dataclass, field

from fader_adapters.errors import AdapterExists, AdapterInvalid, BlendInvalid, VersionConflict
from fader_adapters.leases import HostAdapter
from fader_adapters.report import AdapterReport
from fader_adapters.spec import ADAPTER_NAME, DIGEST_PREFIX, MAX_WEIGHT, NESTED_NAME, Digest


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """One name at one instant."""

    name: str
    version: Digest
    report: AdapterReport
    nbytes: int
    leases: int
    """On this version, under any name."""
    pinned: bool
    retired: tuple[Digest, ...]
    """Earlier versions of this name that are still leased or claimed, sorted."""


@dataclass(slots=True, eq=False)
class NameRecord:
    """Where a name stands."""

    version: Digest
    pinned: bool
    former: set[Digest] = field(default_factory=set)
    """Versions in memory that it meant before."""


@dataclass(slots=True, eq=False)
class VersionRecord:
    """One version in memory and everything that holds it."""

    adapter: HostAdapter
    names: set[str] = field(default_factory=set)
    """Where it is current."""
    former: set[str] = field(default_factory=set)
    """Where it was current before."""
    kept: set[str] = field(default_factory=set)
    """Of `names` and `former`, those for which it is claimed."""
    leases: int = 0
    reservations: int = 0
    forgets: int = 0
    """Calls of `on_retired` not yet answered by `reclaim`."""

    @property
    def wanted(self) -> bool:
        return bool(self.names or self.kept or self.leases or self.reservations)

    @property
    def labels(self) -> set[str]:
        """What to call it by: its names, else those it had."""
        return self.names or self.former

    def retired_from(self, name: str) -> bool:
        """Whether the name meant this version before and a lease or a claim still holds it."""
        return name in self.former and (self.leases > 0 or name in self.kept)


def check_name(name: str) -> None:
    """Raises AdapterInvalid."""
    if not (ADAPTER_NAME.fullmatch(name) or NESTED_NAME.fullmatch(name)):
        raise AdapterInvalid(
            "an adapter's name has 1 to 128 letters, digits, '.', '_' or '-' and starts with a "
            f"letter or digit, got {name[:160]!r}"
        )


def check_weight(weight: float) -> None:
    """Raises BlendInvalid."""
    if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
        raise BlendInvalid(
            f"an adapter's weight is a number from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}, got {weight}"
        )


def check_version(name: str, current: str, expected: str | None) -> None:
    """Compare-and-swap: `current` is "" for a free name, `expected` None asks nothing.

    Raises VersionConflict.
    """
    if expected is None or expected == current:
        return
    if DIGEST_PREFIX.fullmatch(expected) and current.startswith(expected):
        return
    wanted = f"at version {expected[:64]}" if expected else "to be free"
    advice = "read it again" if expected else "swap it, or choose another name"
    found = f"at {current}" if current else "not loaded"
    raise VersionConflict(f"expected {name!r} {wanted}, it is {found}; {advice}")


def check_move(name: str, current: str, *, replace: bool, if_version: str | None) -> None:
    """Whether a name may mean another version. Raises VersionConflict, and AdapterExists for one
    that is taken and is not to be replaced."""
    check_version(name, current, if_version)
    if current and not replace and if_version is None:
        raise AdapterExists(f"the adapter {name!r} is loaded already; ask to replace it")
