"""One HTTP/1.1 connection: bounds on what a client may keep waiting, and an end that it hears.

Knows bytes and time; nothing of the application.
"""

import asyncio
import json
import logging
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fader_server.api.edge import request_id
from fader_server.api.errors import describe, malformed
from fader_server.errors import Overloaded

_log = logging.getLogger(__name__)
_TELL_SECONDS = 10.0
"""The log has a line of refused connections no more often."""
_ABSOLUTE = re.compile(rb"https?://([^/?#@]+)(?=[/?]|$)", re.IGNORECASE)
LINGER_SECONDS = 5.0
LINGER_BYTES = 1 << 26
"""What may still come after the last answer: many clients read theirs once all is sent."""


class LingeringTransport(asyncio.Transport):
    """A socket that may be closed while the client still sends.

    To close with bytes unread resets the connection, and the client may never see its answer. So
    then it says that no more is written, and takes what comes, up to the bounds above.

    inner    the socket's own
    sending  whether the client is in the middle of something
    """

    def __init__(self, inner: asyncio.Transport, sending: Callable[[], bool]) -> None:
        super().__init__()
        self._inner = inner
        self._sending = sending
        self._left = LINGER_BYTES
        self._end: asyncio.TimerHandle | None = None

    @property
    def lingering(self) -> bool:
        return self._end is not None

    def close(self) -> None:
        if self.is_closing() or not self._sending():
            self._inner.close()
            return
        loop = asyncio.get_running_loop()
        self._end = loop.call_later(LINGER_SECONDS, self._inner.abort)
        self._inner.write_eof()
        self._inner.resume_reading()

    def discard(self, count: int) -> None:
        """So many bytes came while it lingered."""
        self._left -= count
        if self._left < 0:
            self._inner.abort()

    def lost(self) -> None:
        """The socket is gone."""
        if self._end is not None:
            self._end.cancel()

    def abort(self) -> None:
        self._inner.abort()

    def is_closing(self) -> bool:
        return self.lingering or self._inner.is_closing()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self.lingering:
            self._inner.write(data)

    def pause_reading(self) -> None:
        self._inner.pause_reading()

    def resume_reading(self) -> None:
        self._inner.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:  # noqa: ANN401 - as its parent
        return self._inner.get_extra_info(name, default)


class OriginForm(h11.Connection):
    """Gives requests whose target is a whole URL, as proxies send them, the form of all others."""

    def next_event(self) -> Any:  # noqa: ANN401 - as its parent
        event = super().next_event()
        if not isinstance(event, h11.Request):
            return event
        found = _ABSOLUTE.match(event.target)
        if found is None:
            return event
        rest = event.target[found.end() :]
        return h11.Request(
            method=event.method,
            target=rest if rest.startswith(b"/") else b"/" + rest,
            headers=[(k, found[1] if k == b"host" else v) for k, v in event.headers],
            http_version=event.http_version,
        )


def bounded_protocol(
    *, client_seconds: float, max_connections: int, most_refused: int
) -> type[H11Protocol]:
    """uvicorn's h11 protocol with a deadline for request heads, one for bodies that nobody waits
    for any more, and a cap on open sockets: one too many takes the place of the one that was idle
    for longest, or is told that there is none. `most_refused` may be open until they heard it."""
    told_at = -_TELL_SECONDS

    class BoundedProtocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None
        _refused = False
        _socket: LingeringTransport

        def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - as its parent has it
            super().__init__(*args, **options)
            most = self.config.h11_max_incomplete_event_size
            assert most is not None  # the bound on request heads
            self.conn = OriginForm(h11.SERVER, most)

        def connection_made(self, transport: Any) -> None:  # noqa: ANN401 - as its parent has it
            self._socket = LingeringTransport(transport, self._sending)
            super().connection_made(self._socket)
            if len(self.connections) > max_connections and not self._take_place():
                self._refuse()
            self._deadline = self.loop.call_later(client_seconds, self._expire)

        def _take_place(self) -> bool:
            """Close the connection that waited longest for another request; False: none waits."""
            idle = [
                (other.timeout_keep_alive_task.when(), id(other), other)
                for other in self.connections
                if isinstance(other, BoundedProtocol) and other.timeout_keep_alive_task is not None
            ]
            if idle:
                *_, other = min(idle)
                other.timeout_keep_alive_handler()
            return bool(idle)

        def _refuse(self) -> None:
            """Its request, whatever it asks, is told that there is no place."""
            nonlocal told_at
            self._refused = True
            if self.loop.time() > told_at + _TELL_SECONDS:
                told_at = self.loop.time()
                _log.warning("connections are refused: %d are open", max_connections)
            if len(self.connections) > max_connections + most_refused:
                self._socket.abort()

        def data_received(self, data: bytes) -> None:
            if self._socket.lingering:
                self._socket.discard(len(data))
                return
            if self._refused:
                told = describe(Overloaded("too many connections: try again later", retry_after=1))
                self._answer(told.status, b"Service Unavailable", told.error, told.headers)
                self._socket.close()
                return
            super().data_received(data)
            waits = self.conn.their_state is h11.IDLE or (self._answered() and self._sending())
            if waits and self._deadline is None:
                self._deadline = self.loop.call_later(client_seconds, self._expire)
            elif not waits:
                self._disarm()

        def send_400_response(self, msg: str) -> None:
            """What is not HTTP gets the same error object as everything else."""
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # its answer is out
                self.transport.abort()
                return
            self._answer(400, b"Bad Request", malformed()["error"])
            if not self._answered():  # a route reads the body: there is no more of it
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self.transport.close()

        def _answer(
            self,
            status: int,
            reason: bytes,
            error: Mapping[str, Any],
            more: Mapping[str, str] = MappingProxyType({}),
        ) -> None:
            """What never reaches the application."""
            body = json.dumps({"error": dict(error)}).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
                (b"x-request-id", self._request_id().encode()),
                *((name.encode(), value.encode()) for name, value in more.items()),
            ]
            answer = h11.Response(status_code=status, headers=headers, reason=reason)
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")

        def _unsupported_upgrade_warning(self) -> None:
            """The answer is HTTP/1.1, as every client expects that asks for h2c in passing.

            uvicorn would advise an install whose parser lifts the bound on request heads.
            """

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            self._socket.lost()
            super().connection_lost(exc)

        def _request_id(self) -> str:
            """The client's own where a head was read that has none of the answer yet."""
            return request_id([] if self._answered() else self.headers or [])

        def _answered(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _sending(self) -> bool:
            return self._refused or self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

        def _disarm(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _expire(self) -> None:
            self._deadline = None
            if self._answered():
                self.transport.abort()

    return BoundedProtocol
