"""Server-sent events: one generation as a stream, with pings, in-band errors and an end.

Knows the framing and the order of chunks; what a chunk says is the renderer's business.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Never

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from fader_server.api.answers import Renderer
from fader_server.api.choice import Delta
from fader_server.api.disconnect import while_connected
from fader_server.api.errors import ClientGone, ClientStalled, describe
from fader_server.api.generate import Generation
from fader_server.api.observe import CallRecord
from fader_server.errors import FaderError

_log = logging.getLogger(__name__)
PING = b": ping\n\n"
_now = time.monotonic
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds between pings of a silent stream, and that a client may leave it unread."""

    ping: float
    stall: float


@dataclass(slots=True)
class Started:
    """A generation whose first token is drawn, or known to take long."""

    generation: Generation
    batches: AsyncIterator[list[Delta]]
    first: "asyncio.Task[list[Delta] | None]"
    """The first batch, None when there is none."""


async def start(generation: Generation, pace: Pace) -> Started:
    """Wait for the first batch, but no longer than a ping takes to fall due.

    An error up to here is raised, so that it is answered with a real HTTP status.
    """
    batches = generation.deltas()
    first = asyncio.ensure_future(_next(batches))
    try:
        await asyncio.wait({first}, timeout=pace.ping)
        if first.done():
            first.result()
    except BaseException:
        first.cancel()
        generation.close()
        raise
    return Started(generation, batches, first)


async def _next(batches: AsyncIterator[list[Delta]]) -> list[Delta] | None:
    return await anext(batches, None)


class EventStream(Response):
    """The streaming answer. Closes its generation however it ends."""

    def __init__(
        self,
        started: Started,
        renderer: Renderer,
        *,
        headers: Mapping[str, str],
        record: CallRecord,
        pace: Pace,
    ) -> None:
        super().__init__(status_code=200, headers={**HEADERS, **headers})
        del self.headers["content-length"]
        self._started = started
        self._renderer = renderer
        self._record = record
        self._pace = pace
        self._writing_since: float | None = _now()
        self._written_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._pump(send), self._watch(send))
            self._end("ok")
        except (ClientStalled, ClientGone) as error:
            # Returning with the answer unfinished makes the server cut the connection.
            self._end(outcome_of(error))
        finally:
            self._started.first.cancel()
            self._end("error")

    async def _pump(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await self._send(send, start)
        try:
            await self._send_batches(send)
        except Exception as error:  # noqa: BLE001 - the status is sent: the stream must say it
            self._end(outcome_of(error))
            if not isinstance(error, FaderError):
                _log.exception("a stream failed")
            await self._write(send, self._renderer.failure(dict(describe(error).error)))
        await self._write(send, self._renderer.last, more=False)

    def _end(self, outcome: str) -> None:
        """Only the first counts. The generation tells its tokens first."""
        self._started.generation.close()
        self._record.end(outcome)

    async def _send_batches(self, send: Send) -> None:
        generation, renderer = self._started.generation, self._renderer
        call, opened = generation.call, False
        choices = max(1, len(call.prompts)) * call.n
        batch = await self._started.first
        while batch is not None:
            usage = generation.usage if call.continuous_usage else None
            told = [] if opened else [renderer.opening(choices, usage)]
            told.append(renderer.chunks(batch, usage))
            if any(told):
                await self._write(send, b"".join(told))
            opened = True
            batch = await anext(self._started.batches, None)
        if closing := renderer.closing(generation.usage):
            await self._write(send, closing)

    async def _watch(self, send: Send) -> Never:
        """Ping while nothing is written; raise ClientStalled when a write takes too long.

        One timer a stream instead of two a token.
        """
        ping, stall = self._pace.ping, self._pace.stall
        while True:
            now, since = _now(), self._writing_since
            if since is not None:
                due = since + stall
                if now >= due:
                    raise ClientStalled("The client left its stream unread for too long.")
            else:
                due = self._written_at + ping
                if now >= due:
                    with contextlib.suppress(TimeoutError):  # the next look raises
                        await asyncio.wait_for(self._write(send, PING), stall)
                    continue
                due = min(due, now + stall)
            await asyncio.sleep(due - now)

    async def _write(self, send: Send, body: bytes, *, more: bool = True) -> None:
        await self._send(send, {"type": "http.response.body", "body": body, "more_body": more})

    async def _send(self, send: Send, message: Message) -> None:
        self._writing_since = self._writing_since or _now()
        await send(message)
        self._writing_since, self._written_at = None, _now()


def outcome_of(error: BaseException) -> str:
    """The word for metrics and logs."""
    if isinstance(error, ClientGone | asyncio.CancelledError):
        return "gone"
    if isinstance(error, ClientStalled):
        return "stalled"
    status = describe(error).status if isinstance(error, Exception) else 500
    if status == 504:
        return "timeout"
    return "refused" if status < 500 or status == 503 else "error"
