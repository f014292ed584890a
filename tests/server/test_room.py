"""Room that is only briefly taken: who needs it waits for it in turn, and nobody for ever."""

import asyncio
import random
from collections.abc import Callable

import pytest

from fader_adapters.errors import AdapterNotFound, ArenaFull
from fader_adapters.extents import ExtentAllocator
from fader_server import room
from fader_server.api.adapter_ports import LoadOrder
from fader_server.errors import Overloaded
from tests.server.room_world import Served, settled


@pytest.mark.parametrize("buffers", [False, True])
async def test_a_parked_adapter_waits_until_a_lease_makes_room(buffers):
    served = Served(4, buffers=buffers)
    await served.load("a-2", "b-2", "c-4")
    held = [await served.lease("a-2"), await served.lease("a-2")]
    waiting = served.asked("c-4")
    for lease in held:
        assert await settled(waiting) == [False]
        lease.release()
    (await waiting).release()
    assert served.at_rest


async def test_free_bytes_that_lie_apart_become_one_piece():
    served = Served(6)
    await served.load("a-1", "b-1", "c-1", "d-1", "e-1", "f-1")
    for name in ("b-1", "d-1"):
        served.adapters.unload(name)
    held = [await served.lease("a-1"), await served.lease("c-1")]
    await served.load("big-3")  # e and f, which nobody uses, go; b's hole is too small
    assert served.tier("e-1") == served.tier("f-1") == "disk"
    for lease in held:
        lease.release()
    assert served.at_rest


async def test_waiting_ends_with_try_again_and_leaves_nothing():
    served = Served(4, seconds=0.2)
    await served.load("a-4", "b-4")
    held = await served.lease("a-4")
    with pytest.raises(Overloaded) as caught:
        await served.lease("b-4")
    assert caught.value.retry_after > 0
    held.release()
    (await served.lease("b-4")).release()
    assert served.at_rest


async def test_who_leaves_stops_waiting_and_the_next_is_served():
    served = Served(4)
    await served.load("a-4", "b-4", "c-2")
    held = await served.lease("a-4")
    first, same, second = served.asked("b-4"), served.asked("b-4"), served.asked("c-2")
    assert await settled(first, same, second) == [False] * 3
    for task in (first, same):
        task.cancel()
    held.release()
    (await second).release()
    assert served.tier("b-4") == "disk", "nobody waited for it any more"
    assert served.at_rest


async def test_one_load_serves_all_who_wait_for_a_name():
    served = Served(4)
    await served.load("a-4", "b-4", "c-4")
    held = await served.lease("a-4")
    same = [served.asked("b-4") for _ in range(8)]
    other = served.asked("c-4")
    last = served.asked("b-4")
    await settled()
    held.release()
    for lease in await asyncio.gather(*same, last):
        assert not other.done()
        lease.release()
    (await other).release()
    assert served.at_rest


@pytest.mark.parametrize("other", ["pinned", "leased"])
async def test_what_never_fits_is_refused_at_once_and_what_may_fit_waits(other):
    served = Served(4)
    await served.load("a-2", "b-3")
    await served.load("a-2")
    held = await served.lease("a-2")
    if other == "pinned":
        served.adapters.pin("a-2", pinned=True)
        with pytest.raises(ArenaFull):
            await served.lease("b-3")
        held.release()
    else:
        waiting = served.asked("b-3")
        assert await settled(waiting) == [False]
        held.release()
        (await waiting).release()
        with pytest.raises(ArenaFull):
            await served.lease("a-2", "b-3")
        (await served.lease("b-3")).release()
        (await served.lease("a-2")).release()  # what is too much together fits alone
    assert served.at_rest


async def test_a_name_that_nothing_has_is_refused_without_a_wait():
    served = Served(4)
    await served.load("a-4", "b-4")
    held = await served.lease("a-4")
    waiting = served.asked("b-4")
    await settled(waiting)
    for names in (("nobody",), ("nobody", "b-4")):
        with pytest.raises(AdapterNotFound):
            await asyncio.wait_for(served.lease(*names), 1)
    held.release()
    (await waiting).release()
    assert served.at_rest


async def test_an_administrators_load_is_refused_at_once():
    served = Served(4)
    await served.load("a-4")
    held = await served.lease("a-4")
    with pytest.raises(ArenaFull):
        await served.load("b-2")
    held.release()


async def test_a_number_of_names_is_waited_for_as_bytes_are():
    served = Served(8, max_adapters=1)
    await served.load("a-1")
    parking = served.adapters._inner
    await parking.load(LoadOrder("b-1", "b-1"), make_room=served.adapters._make_room)
    held = await served.lease("b-1")
    waiting = served.asked("a-1")
    assert await settled(waiting) == [False]
    held.release()
    (await waiting).release()


async def use(served: Served, name: str, seconds: float, until: Callable[[], bool]) -> None:
    """Requests for one name that overlap: it has a lease all the time, if it may."""
    held = await served.lease(name)
    while not until():
        following = served.asked(name)
        await asyncio.sleep(seconds)
        held.release()
        held = await following
    held.release()


@pytest.mark.parametrize("patience", [0.1, 1e9])
async def test_others_do_not_keep_the_first_in_line_waiting_for_ever(monkeypatch, patience):
    monkeypatch.setattr(room, "PATIENCE", patience)
    served = Served(4, seconds=1.0)
    await served.load("a-2", "b-2", "c-4")
    (await served.lease("a-2")).release()
    (await served.lease("b-2")).release()
    waiting: list[asyncio.Task] = []
    users = [
        asyncio.create_task(use(served, name, 0.03, lambda: bool(waiting) and waiting[0].done()))
        for name in ("a-2", "b-2")
    ]
    await settled()
    waiting.append(served.asked("c-4"))
    (found,) = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(found, Overloaded) == (patience == 1e9), "the control starves"
    if not isinstance(found, BaseException):
        found.release()
    await asyncio.gather(*users)
    assert served.at_rest


async def test_a_lease_without_end_keeps_nobody_from_what_lies_elsewhere(monkeypatch):
    monkeypatch.setattr(room, "PATIENCE", 0.05)
    monkeypatch.setattr(room, "SLOW_SECONDS", 0.1)
    served = Served(4)
    await served.load("long-2", "a-2", "c-2")  # a and long lie where c would fit
    long, *busy = [await served.lease(name) for name in ("long-2", "a-2", "a-2")]
    waiting = served.asked("c-2")
    await settled(waiting)
    await settled(waiting)
    following = served.asked("a-2")
    assert await settled(following) == [False], "a shall end: long does not"
    for lease in busy:
        lease.release()
    (await waiting).release()
    (await following).release()
    long.release()
    assert served.at_rest


@pytest.mark.parametrize("seed", range(3))
async def test_under_load_everybody_is_served_and_leases_return_to_zero(monkeypatch, seed):
    monkeypatch.setattr(room, "PATIENCE", 0.02)
    choose = random.Random(seed)
    served = Served(9)
    names = [f"x{n}-{1 + n % 6}" for n in range(12)]
    await served.load(*names)
    ends: list[str] = []

    async def client() -> None:
        for _ in range(12):
            some = choose.sample(names, choose.choice((1, 1, 1, 2)))
            if sum(int(name[-1]) for name in some) > 9:
                some = some[:1]
            task = served.asked(*some)
            if choose.random() < 0.1:
                await asyncio.sleep(choose.random() / 100)
                task.cancel()
            try:
                lease = await task
            except asyncio.CancelledError:
                ends.append("cancelled")
                continue
            await asyncio.sleep(choose.random() / 200)
            lease.release()
            ends.append("served")

    await asyncio.gather(*(client() for _ in range(8)))
    assert ends.count("served") > 80
    assert len(ends) == 96
    assert served.at_rest


@pytest.mark.parametrize("seed", range(20))
def test_the_cheapest_piece_is_found(seed):
    choose = random.Random(seed)
    extents = ExtentAllocator(32 * 24)
    taken = [
        at for _ in range(20) if (at := extents.allocate(32 * choose.randint(1, 3))) is not None
    ]
    for at in choose.sample(taken, 3):
        extents.release(at)
        taken.remove(at)
    costs = {at: choose.randint(0, 4) for at in taken if choose.random() < 0.8}
    size = 32 * choose.randint(1, 8)

    def fits(gone: list[int]) -> bool:
        tried = extents.copy()
        for at in gone:
            tried.release(at)
        return tried.allocate(size) is not None

    def cost(gone: list[int]) -> int:
        return sum(costs[at] for at in gone)

    some = sorted(costs)
    runs = [some[a:b] for a in range(len(some)) for b in range(a, len(some) + 1)]
    possible = [cost(run) for run in runs if fits(run)]
    found = extents.clearing(size, costs)
    assert (found is None) == (not possible)
    if found is not None:
        assert fits(found)
        assert cost(found) == min(possible)
