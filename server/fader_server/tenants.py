"""Who may call and what is theirs: keys, the adapters they see, and their part of the machine.

Knows keys by their sha256 only.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tenant:
    """One customer of the server, by one key or several."""

    name: str
    """In logs and metrics."""
    keys: tuple[bytes, ...]
    """sha256 digests."""
    adapters: tuple[str, ...] = ("*",)
    """Globs of the names of adapters and recipes that exist for it. The base does for everybody."""
    weight: float = 1.0
    """Of the tokens that are computed while others wait, too."""
    max_share: float = 1.0
    """Of the rows, of the blocks for keys and values and of the adapters' memory that its running
    requests may have at a time; one request may always run."""
    max_waiting: int | None = None
    """Queued requests before 429; None: as many as the server's own queue holds."""
