"""Carries one request's events from the engine thread to a coroutine. Knows no text, no HTTP."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol, Self

from fader_server.core import Request, Sink, TokenEvent


class Submitter(Protocol):
    """What a stream needs of the engine."""

    def submit(self, request: Request, sink: Sink) -> None: ...

    def abort(self, request_id: str) -> None: ...


class TokenStream:
    """An async iterator over a request's events; the last one has `finish` or `error`.

    Use it in an `async with`: leaving early aborts the request. `release` runs exactly once, on
    the event loop, as soon as the request has ended, however it ended and whoever still reads.
    One reader. What a slow reader has not taken waits here: at most max_tokens + 1 small events.
    """

    def __init__(self, request_id: str, engine: Submitter, *, release: Callable[[], None]) -> None:
        self.request_id = request_id
        self._engine = engine
        self._release: Callable[[], None] | None = release
        self._loop = asyncio.get_running_loop()
        self._arrived: deque[TokenEvent] = deque()  # filled by the engine thread
        self._waking = False
        self._events: deque[TokenEvent] = deque()
        self._ready = asyncio.Event()
        self._ended = False

    @classmethod
    def open(cls, engine: Submitter, request: Request, *, release: Callable[[], None]) -> Self:
        """Submit a request. Raises what `submit` raises, after the release."""
        stream = cls(request.id, engine, release=release)
        try:
            engine.submit(request, stream.sink)
        except BaseException:
            stream._end()
            raise
        return stream

    def sink(self, event: TokenEvent) -> None:
        """Take an event on the engine thread; never waits. Wakes the loop once per backlog."""
        self._arrived.append(event)
        if self._waking:
            return
        self._waking = True
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the loop is closed: nobody is left to read
            self._waking = False

    def ready(self) -> list[TokenEvent]:
        """Take every event that is already here, without waiting; may be empty."""
        taken = list(self._events)
        self._events.clear()
        return taken

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenEvent:
        while not self._events:
            if self._ended:
                raise StopAsyncIteration
            self._ready.clear()
            await self._ready.wait()
        return self._events.popleft()

    async def aclose(self) -> None:
        """Abort the request unless it has ended. Idempotent."""
        if not self._ended:
            self._engine.abort(self.request_id)
            self._end()
        self._events.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def _wake(self) -> None:
        self._waking = False  # before reading, so that no later event goes unnoticed
        while self._arrived:
            event = self._arrived.popleft()
            if self._ended:
                continue
            self._events.append(event)
            if event.finish is not None or event.error is not None:
                self._end()
        self._ready.set()

    def _end(self) -> None:
        self._ended = True
        self._ready.set()
        release, self._release = self._release, None
        if release is not None:
            release()
