"""The listening socket, the HTTP server and its drain. Knows the application by its context."""

import asyncio
import contextlib
import json
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from fader_server.api.context import Context
from fader_server.api.errors import malformed
from fader_server.api.ports import Engine
from fader_server.config import ServeConfig
from fader_server.errors import ConfigInvalid, EngineFault

_MAX_HEADER_BYTES = 16 * 1024
_KEEP_ALIVE_SECONDS = 30
_PULSE_SECONDS = 0.25
"""How soon the death of the engine is noticed."""


def bind(config: ServeConfig) -> socket.socket:
    """Open the listening socket. Raises ConfigInvalid when the address cannot be had."""
    sock: socket.socket | None = None
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # the kernel ends connections nobody reads
            milliseconds = int(config.stall_timeout * 1000)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        sock.bind(address)
    except OSError as error:
        if sock is not None:
            sock.close()
        reason = error.strerror or "not an address"
        raise ConfigInvalid(
            f"cannot bind {config.host} port {config.port}: {reason}; choose --host and --port"
        ) from None
    return sock


def bounded_protocol(*, header_seconds: float, max_connections: int) -> type[H11Protocol]:
    """uvicorn's h11 protocol with a deadline for request heads and a cap on open sockets."""

    class BoundedProtocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:  # noqa: ANN401 - as its parent has it
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                transport.abort()
                return
            self._deadline = self.loop.call_later(header_seconds, self._expire)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            in_head = self.conn.their_state is h11.IDLE
            if in_head and self._deadline is None:
                self._deadline = self.loop.call_later(header_seconds, self._expire)
            elif not in_head:
                self._disarm()

        def send_400_response(self, msg: str) -> None:
            """What is not HTTP gets the same error object as everything else."""
            body = json.dumps(malformed()).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            answer = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def _unsupported_upgrade_warning(self) -> None:
            """The answer is HTTP/1.1, as every client expects that asks for h2c in passing.

            uvicorn would advise an install whose parser lifts the bound on request heads.
            """

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def _disarm(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _expire(self) -> None:
            self._deadline = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()

    return BoundedProtocol


class Server(uvicorn.Server):
    """uvicorn that leaves signals to us, so that a drain comes before the listener closes."""

    def __init__(self, config: ServeConfig, app: FastAPI) -> None:
        protocol = bounded_protocol(
            header_seconds=config.body_timeout, max_connections=config.max_connections
        )
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(config.drain_timeout) + 10,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Drain:
    """From the first signal to the last answer. Each further signal skips what is waited for."""

    def __init__(self, server: uvicorn.Server, context: Context) -> None:
        self._server = server
        self._context = context
        self._task: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    def begin(self) -> None:
        """Start draining, or hurry. Call on the event loop."""
        if self._task is None:
            self._context.readiness.reason = "draining"
            self._task = asyncio.ensure_future(self._run())
        else:
            self._hurry.set()

    async def _run(self) -> None:
        config = self._context.config
        await self._wait(config.drain_grace)
        self._server.should_exit = True  # closes the listener; answers under way go on
        await self._wait(config.drain_timeout)
        self._context.generator.end_all()

    async def _wait(self, seconds: float) -> None:
        self._hurry.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), seconds)

    async def finish(self) -> None:
        """The server has ended: nothing is left to wait for."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


async def _end_with(engine: Engine, drain: Drain) -> None:
    """Drain once the engine is dead: a new process is what helps, and whoever started this one
    knows it by its exit."""
    while engine.stats().healthy:  # noqa: ASYNC110 - its thread knows no event loop
        await asyncio.sleep(_PULSE_SECONDS)
    drain.begin()


async def serve(
    app: FastAPI, sock: socket.socket, *, on_hangup: Callable[[], None] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT and the drain after it. Ready once it listens.

    on_hangup  called on the event loop at every SIGHUP; None: that ends the process, as it does

    Raises EngineFault after the drain when the engine ended by itself.
    """
    context: Context = app.state.context
    server = Server(context.config, app)
    drain = Drain(server, context)
    loop = asyncio.get_running_loop()
    handlers = {signal.SIGTERM: drain.begin, signal.SIGINT: drain.begin}
    if on_hangup is not None:
        handlers[signal.SIGHUP] = on_hangup
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    context.readiness.reason = ""
    watch = asyncio.create_task(_end_with(context.engine, drain))
    try:
        await server.serve(sockets=[sock])
    finally:
        watch.cancel()
        for number in handlers:
            loop.remove_signal_handler(number)
        await drain.finish()
    stats = context.engine.stats()
    if not stats.healthy:
        raise EngineFault(f"ended: {stats.reason}")
