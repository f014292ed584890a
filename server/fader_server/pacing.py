"""What background work may take from running streams: slices of a thread, with rests between.

Knows no work. Low priority would not do: a thread that waits for a core may hold Python's lock.
"""

import threading
import time
from collections.abc import Callable

SLICE = 2e-4
"""Seconds of work without a rest."""
REST = 8.0
"""Seconds of rest a second of work while requests run."""


class Cancelled(Exception):
    """Nobody wants the result any more."""


class Pace:
    """A Pause for the work of one thread; rests while `busy`. `cancel` is for any thread."""

    def __init__(
        self,
        busy: Callable[[], bool],
        *,
        clock: Callable[[], float] = time.thread_time,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        """clock: seconds that the calling thread has computed."""
        self._busy = busy
        self._clock = clock
        self._wait = wait
        self._cancelled = threading.Event()
        self._since: float | None = None

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def __call__(self) -> None:
        """After a piece of work; the first call is before it. Raises Cancelled."""
        if self.cancelled:
            raise Cancelled
        if self._since is None:
            self._since = self._clock()
        worked = self._clock() - self._since
        if worked < SLICE:
            return
        if self._busy() and self._wait(self._cancelled, worked * REST):
            raise Cancelled
        self._since = self._clock()
