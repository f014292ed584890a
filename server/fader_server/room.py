"""Who waits for room in memory: tenants in turn, and those who want the same as one.

Knows names and what lies in the way of the first in line; loads nothing.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from fader_adapters.room import InTheWay, RoomWanted
from fader_server.errors import Overloaded
from fader_server.portions import Portions

Names = frozenset[str]
FindWay = Callable[[RoomWanted, Collection[str]], InTheWay | None]
"""Where room could be made, at best not among the names that were slow to go."""
Counted = Callable[[str], AbstractContextManager[None]]
"""Counts one more of a tenant that waits. Raises TenantBusy."""

PATIENCE = 1.0
"""Seconds that the first in line looks on while others go on leasing what lies in its way."""
SLOW_SECONDS = 5.0
"""Seconds after which what was asked to end, and did not, makes it look elsewhere."""
LOOK_SECONDS = 0.02
"""Between two looks. Leases end on several threads; one who waits looks, for all."""


@dataclass(slots=True, eq=False)
class Place:
    """What some names need, and who waits for it."""

    names: Names
    waiting: Counter[str] = field(default_factory=Counter)
    """By tenant."""
    wanted: RoomWanted | None = None
    """None: nothing was found missing yet."""
    first: asyncio.Event = field(default_factory=asyncio.Event)
    look: asyncio.Task[Names] | None = None
    """One for all who wait here."""
    barred: Names = frozenset()
    """Nobody behind may lease these: the place needs their room."""
    slow: set[str] = field(default_factory=set)
    since: float | None = None
    """When it was first in line; then when it barred what it bars now."""


class Line:
    """Places of the tenants that wait: the turn goes round them, and within one by arrival.

    A tenant's clock moves on by its turns, slower the more weight it has, and the one that is
    behind is next; the first keeps its turn until all who wait there are gone. A place of several
    is whose turn it came to. Belongs to the event loop.
    """

    def __init__(
        self, find: FindWay, *, longest: int, counted: Counted = lambda tenant: nullcontext()
    ) -> None:
        """`longest`: requests that may wait, see Portions. `counted` is entered by each."""
        self._find = find
        self._longest = longest
        self._counted = counted
        self._weights: Mapping[str, float] = {}
        self._places: dict[Names, Place] = {}
        self._queues: dict[str, dict[Names, Place]] = {}
        """Of the tenants that wait, in the order in which they asked."""
        self._waiting = Portions()
        self._clocks: dict[str, float] = {}
        """Turns over weight, from when it came; of all who waited since the line was empty."""
        self._first: Place | None = None
        self._whose = ""
        """The tenant whose turn the first is."""

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return self._waiting.total

    def share(self, weights: Mapping[str, float]) -> None:
        """Weights of the tenants that have another than 1, from the next turn on."""
        self._weights = weights

    def passes(self, names: Names, *, missing: Callable[[str], bool]) -> bool:
        """Whether a request need not join: it takes nothing that the first in line waits for."""
        first = self._first
        if first is None or not names or first.names == names:
            return True
        return names.isdisjoint(first.barred) and not any(map(missing, names))

    @contextmanager
    def joined(self, names: Names, wanted: RoomWanted | None, *, tenant: str) -> Iterator[Place]:
        """A place, shared with those who want the same. Raises Overloaded, TenantBusy."""
        if self._waiting.full(tenant, self._longest):
            raise Overloaded("Too many requests wait for room for their adapters.", retry_after=2)
        with self._counted(tenant), self._waiting.one(tenant):
            place = self._join(names, tenant)
            place.wanted = place.wanted or wanted
            try:
                yield place
            finally:
                self._leave(place, tenant)

    async def turn(self, place: Place) -> Names:
        """Wait to be the first, and for the leases on what lies in the way to end: it may go now,
        and others may not lease it again."""
        await place.first.wait()
        if place.look is None or place.look.done():
            place.look = asyncio.create_task(self._watch(place))
        return await asyncio.shield(place.look)  # who looks may leave; the others wait on

    def _join(self, names: Names, tenant: str) -> Place:
        if tenant not in self._queues:  # time in which it asked for nothing is not saved up
            slowest = min((self._clocks[other] for other in self._queues), default=0.0)
            self._clocks[tenant] = max(self._clocks.get(tenant, 0.0), slowest)
        place = self._places.setdefault(names, Place(names))
        place.waiting[tenant] += 1
        self._queues.setdefault(tenant, {})[names] = place
        self._call_first()
        return place

    def _leave(self, place: Place, tenant: str) -> None:
        place.waiting[tenant] -= 1
        if not place.waiting[tenant]:
            del place.waiting[tenant]
            del self._queues[tenant][place.names]
            if not self._queues[tenant]:
                del self._queues[tenant]
        if place.waiting:
            return
        del self._places[place.names]
        if place.look is not None:
            place.look.cancel()
        if place is self._first:
            self._first = None
            self._clocks[self._whose] += 1 / self._weights.get(self._whose, 1.0)
        self._call_first()

    def _call_first(self) -> None:
        if self._first is not None:
            return
        if not self._places:
            self._clocks.clear()
            return
        self._whose = min(self._queues, key=self._clocks.__getitem__)
        self._first = next(iter(self._queues[self._whose].values()))
        self._first.first.set()

    async def _watch(self, place: Place) -> Names:
        while place.wanted is not None:
            way = self._find(place.wanted, place.slow)
            if way is None:  # nothing helps: the attempt will tell
                break
            if not way.leases:
                place.barred = way.names
                return way.names
            self._bar(place, way.names)
            await asyncio.sleep(LOOK_SECONDS)
        return frozenset()

    def _bar(self, place: Place, names: Names) -> None:
        now = asyncio.get_running_loop().time()
        if place.since is None:
            place.since = now
        if now < place.since + PATIENCE and not place.slow and names != place.barred:
            return
        if names <= place.slow:  # they all are: begin anew
            place.slow.clear()
        if names != place.barred:
            place.barred, place.since = names, now
        elif now >= place.since + SLOW_SECONDS:
            place.slow |= names
