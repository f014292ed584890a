"""Carries events from the engine thread to coroutines. Never blocks the engine, never drops.

A mailbox holds no more than its call may generate; a slow reader finds many events at once.
"""

import asyncio
from collections import deque

from fader_server.core import TokenEvent


class Bell:
    """Wakes the mailboxes of one loop: one call across threads for all that a step fills."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._filled: deque[asyncio.Event] = deque()
        self._rung = False

    def ring(self, ready: asyncio.Event) -> None:
        """Set `ready` on the loop. From any thread; nothing once the loop has closed."""
        self._filled.append(ready)
        if self._rung:
            return
        self._rung = True
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the loop is closed: the server is gone
            return

    def _wake(self) -> None:
        self._rung = False  # before draining: who rings from here on calls again
        while self._filled:
            self._filled.popleft().set()


class Mailbox:
    """One call's inbox: any thread posts, one coroutine on the bell's loop reads."""

    def __init__(self, bell: Bell) -> None:
        self._bell = bell
        self._events: deque[TokenEvent] = deque()
        self._ready = asyncio.Event()
        self._announced = False
        self._failure: Exception | None = None

    def post(self, event: TokenEvent) -> None:
        """From any thread. Events after the loop has closed are nobody's."""
        self._events.append(event)
        if not self._announced:
            self._announced = True
            self._bell.ring(self._ready)

    def fail(self, error: Exception) -> None:
        """From the loop: the next `take` raises."""
        self._failure = error
        self._ready.set()

    async def take(self) -> list[TokenEvent]:
        """All events so far, at least one. Raises what `fail` was given."""
        await self._ready.wait()
        self._ready.clear()
        self._announced = False  # before draining: a post from here on announces itself again
        events = [self._events.popleft() for _ in range(len(self._events))]
        if self._failure is not None:
            raise self._failure
        return events or await self.take()
