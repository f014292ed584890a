"""One work at a time, of tenants in turn. Knows tenants by name only."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Whose turn it is. Belongs to the event loop."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """Of tenants with somebody who waits, the next one first."""

    @asynccontextmanager
    async def one(self, tenant: str) -> AsyncIterator[None]:
        """A turn of the tenant's: after its own that wait, and at most one of each other's."""
        if self._taken:
            await self._wait(tenant)
        self._taken = True
        try:
            yield
        finally:
            self._pass(tenant)

    async def _wait(self, tenant: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(tenant, turn)
            else:  # it was given in the same moment
                self._pass(tenant)
            raise

    def _pass(self, tenant: str) -> None:
        """To the next, the tenant's own last."""
        if tenant in self._waiting:
            self._waiting[tenant] = self._waiting.pop(tenant)
        while self._waiting:
            first = next(iter(self._waiting))
            turn = self._waiting[first][0]
            self._forget(first, turn)
            if not turn.cancelled():
                turn.set_result(None)
                return
        self._taken = False

    def _forget(self, tenant: str, turn: "asyncio.Future[None]") -> None:
        queue = self._waiting.get(tenant, deque())
        if turn in queue:
            queue.remove(turn)
            if not queue:
                del self._waiting[tenant]
