"""Carries events from the engine thread to one coroutine. Never blocks the engine, never drops.

Its length is bounded by what the call may generate; a slow reader finds many events at once.
"""

import asyncio
from collections import deque

from fader_server.core import TokenEvent


class Mailbox:
    """One call's inbox: any thread posts, one coroutine on `loop` reads."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[TokenEvent] = deque()
        self._ready = asyncio.Event()
        self._announced = False
        self._failure: Exception | None = None

    def post(self, event: TokenEvent) -> None:
        """From any thread. Events after the loop has closed are nobody's."""
        self._events.append(event)
        if self._announced:
            return
        self._announced = True
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:  # the loop is closed: the server is gone
            return

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
