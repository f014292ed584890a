"""Worlds over fakes: over ASGI, and behind a real socket for clients that need one."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest

from fader_server.serving import Server, bind
from tests.server.api.api_fakes import World, build_world


@pytest.fixture
def worlds() -> Iterator[Callable[..., World]]:
    """Builds worlds from settings; stops their engines and checks that nothing is left."""
    made: list[World] = []

    def make(**changes: Any) -> World:
        made.append(build_world(**changes))
        return made[-1]

    yield make
    for world in made:
        world.engine.stop()
        assert world.adapters.leases == 0, "a lease was not released"


@pytest.fixture
def world(worlds: Callable[..., World]) -> World:
    return worlds()


@contextlib.asynccontextmanager
async def asgi(world: World, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(world.app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://localhost", headers=headers
    ) as client:
        yield client


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with asgi(world) as found:
        yield found


@contextlib.asynccontextmanager
async def listening(world: World) -> AsyncIterator[int]:
    """A real server on a free port; its port."""
    config = world.app.state.context.config
    with bind(config) as sock:
        server = Server(config, world.app)
        task = asyncio.create_task(server.serve(sockets=[sock]))
        await world.until(lambda: server.started)
        try:
            yield sock.getsockname()[1]
        finally:
            server.should_exit = True
            await task
