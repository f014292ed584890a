"""What holders of names beside the adapters ask of the store. Knows no holder."""

from dataclasses import dataclass

from fader_adapters.spec import Digest


@dataclass(frozen=True, slots=True)
class Claims:
    """All that is claimed at one time."""

    names: frozenset[str] = frozenset()
    """No adapter may take one of them."""
    versions: frozenset[tuple[str, Digest]] = frozenset()
    """(adapter, version): stays in memory when the name moves on, and goes when it is unloaded."""


NONE = Claims()
