"""Runs work only as long as its client stays connected."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Never, TypeVar

from starlette.types import Receive

from fader_server.api.errors import ClientGone

T = TypeVar("T")


async def while_connected(
    receive: Receive,
    work: Coroutine[Any, Any, T],
    *watches: Coroutine[Any, Any, Never],
) -> T:
    """The work's result; cancels it and raises ClientGone when the client leaves first.

    Call after the body has been read: everything `receive` yields from then on is the end.
    watches  end by raising, and end the work so
    """
    task = asyncio.ensure_future(work)
    guards = [asyncio.ensure_future(watch) for watch in (_gone(receive), *watches)]
    try:
        await asyncio.wait({task, *guards}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise next(error for guard in guards if guard.done() and (error := guard.exception()))
    finally:
        for pending in (task, *guards):
            pending.cancel()
        await asyncio.gather(task, *guards, return_exceptions=True)


async def _gone(receive: Receive) -> Never:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientGone
