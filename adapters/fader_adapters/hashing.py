"""Hashes of much data by a thread that lets others go first."""

from typing import Protocol

from fader_adapters.pauses import Pause

_SLICE = 1 << 18
"""Bytes between two pauses: a fifth of a millisecond."""


class Hash(Protocol):
    """What hashlib's constructors make."""

    def update(self, data: memoryview, /) -> None: ...


def absorb(state: Hash, data: bytes, pause: Pause) -> None:
    """Feed `data` to a hash."""
    view = memoryview(data)
    for start in range(0, len(data), _SLICE):
        state.update(view[start : start + _SLICE])
        pause()
