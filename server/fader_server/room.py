"""Who waits for room in memory: one after the other, and those who want the same as one.

Knows names and what lies in the way of the first in line; loads nothing.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fader_adapters.room import InTheWay, RoomWanted
from fader_server.errors import Overloaded

Names = frozenset[str]
FindWay = Callable[[RoomWanted, Collection[str]], InTheWay | None]
"""Where room could be made, at best not among the names that were slow to go."""

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
    waiting: int = 0
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
    """Places in the order they were taken. Belongs to the event loop."""

    def __init__(self, find: FindWay, *, longest: int) -> None:
        """`longest`: requests that may wait."""
        self._find = find
        self._longest = longest
        self._places: OrderedDict[Names, Place] = OrderedDict()
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return self._waiting

    def passes(self, names: Names, *, missing: Callable[[str], bool]) -> bool:
        """Whether a request need not join: it takes nothing that the first in line waits for."""
        first = next(iter(self._places.values()), None)
        if first is None or not names or first.names == names:
            return True
        return names.isdisjoint(first.barred) and not any(map(missing, names))

    @contextmanager
    def joined(self, names: Names, wanted: RoomWanted | None) -> Iterator[Place]:
        """A place, shared with those who want the same. Raises Overloaded."""
        if self._waiting >= self._longest:
            raise Overloaded("Too many requests wait for room for their adapters.", retry_after=2)
        place = self._places.setdefault(names, Place(names))
        place.wanted = place.wanted or wanted
        place.waiting += 1
        self._waiting += 1
        self._call_first()
        try:
            yield place
        finally:
            place.waiting -= 1
            self._waiting -= 1
            if not place.waiting:
                del self._places[names]
                if place.look is not None:
                    place.look.cancel()
                self._call_first()

    async def turn(self, place: Place) -> Names:
        """Wait to be the first, and for the leases on what lies in the way to end: it may go now,
        and others may not lease it again."""
        await place.first.wait()
        if place.look is None or place.look.done():
            place.look = asyncio.create_task(self._watch(place))
        return await asyncio.shield(place.look)  # who looks may leave; the others wait on

    def _call_first(self) -> None:
        for place in self._places.values():
            place.first.set()
            return

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
