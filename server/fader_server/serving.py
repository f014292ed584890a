"""The listening socket, the HTTP server and its drain. Knows the application by its context."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from fader_server.api.context import Context
from fader_server.api.ports import Engine
from fader_server.config import ServeConfig
from fader_server.connection import bounded_protocol
from fader_server.descriptors import ACCEPTS, make_places, told_seldom
from fader_server.errors import ConfigInvalid, EngineFault

_MAX_HEADER_BYTES = 16 * 1024
_KEEP_ALIVE_SECONDS = 75
"""Longer than usual proxies keep theirs, which would else use one that is being closed."""
_QUEUE = 2048
"""Connections that the kernel holds until they are taken."""
_PULSE_SECONDS = 0.25
"""How soon the death of the engine is noticed."""
_LONGEST_MS = 2**31 - 1
"""That the kernel takes."""


def bind(config: ServeConfig) -> socket.socket:
    """Open the listening socket. Raises ConfigInvalid when the address cannot be had."""
    sock: socket.socket | None = None
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # the kernel ends connections nobody reads
            milliseconds = min(int(config.stall_timeout * 1000), _LONGEST_MS)
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


class Server(uvicorn.Server):
    """uvicorn that leaves signals to us, so that a drain comes before the listener closes."""

    def __init__(self, config: ServeConfig, app: FastAPI) -> None:
        places = make_places(config.max_connections)
        protocol = bounded_protocol(
            client_seconds=config.body_timeout,
            max_connections=places.connections,
            most_refused=places.refused,
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
                backlog=ACCEPTS,
                h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(config.drain_timeout) + 10,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(told_seldom())
        await super().startup(sockets)
        for sock in sockets or ():  # asyncio takes one number for this queue and for its own turns
            sock.listen(_QUEUE)

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
