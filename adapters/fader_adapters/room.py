"""Room in host memory: what is wanted of it, and what lies in the way. Facts only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RoomWanted:
    """What the adapters of one request need of the memory."""

    piece: int
    """Bytes in one piece that were not there; 0: too many names were loaded."""
    total: int
    """Bytes of them all, as far as they are known."""
    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class InTheWay:
    """Where room could be made with the least to wait for."""

    names: frozenset[str]
    """What lies there, with the former names of versions that only leases hold."""
    leases: int
    """On what lies there; 0: it can go now."""
