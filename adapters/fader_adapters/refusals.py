"""Contents that were refused, remembered by their hash: what is broken is not read twice.

Knows bytes and errors; no names, no sources.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from fader_adapters.errors import AdapterError
from fader_adapters.hashing import absorb
from fader_adapters.pauses import Pause
from fader_adapters.source import RawAdapter

SECONDS = 600.0
"""How long a refusal is repeated."""
MOST = 1024

_Sizes = tuple[int, int]


class Refusals:
    """What was refused lately and why. For any thread."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[_Sizes, bytes], tuple[float, AdapterError]] = OrderedDict()

    def check(self, raw: RawAdapter, pause: Pause) -> None:
        """Raise what these bytes were refused with. They are hashed only where others of their
        sizes were refused: what is good pays nothing."""
        with self._lock:
            alike = any(sizes == _sizes(raw) for sizes, _ in self._known)
        if not alike:
            return
        key = _key(raw, pause)
        with self._lock:
            until, error = self._known.get(key, (0.0, None))
        if error is not None and self._clock() < until:
            raise type(error)(*error.args)

    def note(self, raw: RawAdapter, error: AdapterError, pause: Pause) -> None:
        """Remember a refusal; the oldest goes when there are too many."""
        key = _key(raw, pause)
        with self._lock:
            self._known[key] = (self._clock() + SECONDS, error.with_traceback(None))
            self._known.move_to_end(key)
            while len(self._known) > MOST:
                self._known.popitem(last=False)


def _sizes(raw: RawAdapter) -> _Sizes:
    return len(raw.config), len(raw.weights)


def _key(raw: RawAdapter, pause: Pause) -> tuple[_Sizes, bytes]:
    state = hashlib.sha256()
    for part in (raw.config, raw.weights):
        absorb(state, part, pause)
    return _sizes(raw), state.digest()
