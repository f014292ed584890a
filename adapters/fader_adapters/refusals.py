"""Contents that were refused, remembered by their hash: what is broken is not read twice.

Knows bytes and errors; no names, no sources.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from fader_adapters.errors import AdapterError
from fader_adapters.hashing import absorb
from fader_adapters.pauses import Pause
from fader_adapters.source import RawAdapter

SECONDS = 600.0
"""How long a refusal is repeated."""
MOST = 1024

_Sizes = tuple[int, int]


class _Refusal(NamedTuple):
    """What makes the error anew. The error itself would hold its traceback, and so the bytes."""

    until: float
    kind: type[AdapterError]
    args: tuple[Any, ...]


class Refusals:
    """What was refused lately and why. For any thread."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[_Sizes, bytes], _Refusal] = OrderedDict()

    def check(self, raw: RawAdapter, pause: Pause) -> None:
        """Raise what these bytes were refused with. They are hashed only where others of their
        sizes were refused: what is good pays nothing."""
        with self._lock:
            self._forget_old()
            alike = any(sizes == _sizes(raw) for sizes, _ in self._known)
        if not alike:
            return
        key = _key(raw, pause)
        with self._lock:
            refusal = self._known.get(key)
        if refusal is not None and self._clock() < refusal.until:
            raise refusal.kind(*refusal.args)

    def note(self, raw: RawAdapter, error: AdapterError, pause: Pause) -> None:
        """Remember a refusal; the oldest goes when there are too many."""
        key = _key(raw, pause)
        with self._lock:
            self._forget_old()
            self._known[key] = _Refusal(self._clock() + SECONDS, type(error), error.args)
            self._known.move_to_end(key)
            while len(self._known) > MOST:
                self._known.popitem(last=False)

    def _forget_old(self) -> None:
        """Those whose time is over: they stand in the order of their times."""
        now = self._clock()
        while self._known and next(iter(self._known.values())).until <= now:
            self._known.popitem(last=False)


def _sizes(raw: RawAdapter) -> _Sizes:
    return len(raw.config), len(raw.weights)


def _key(raw: RawAdapter, pause: Pause) -> tuple[_Sizes, bytes]:
    state = hashlib.sha256()
    for part in (raw.config, raw.weights):
        absorb(state, part, pause)
    return _sizes(raw), state.digest()
