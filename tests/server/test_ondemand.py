"""Loading on first use: one load for all who ask, bad names cost nothing, what is used stays."""

import asyncio
import os
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from fader_adapters.errors import (
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    ArenaFull,
    SourceForbidden,
    SourceNotFound,
    SourceUnavailable,
    VersionConflict,
)
from fader_adapters.roots import Found
from fader_server import bringing, refusals
from fader_server.api.adapter_ports import Loaded, LoadOrder
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.errors import Overloaded
from fader_server.metrics import Metrics
from fader_server.ondemand import OnDemand
from fader_server.parking import Parking
from fader_server.state import RememberedAdapters
from fader_server.state_entries import State, Wanted
from fader_server.state_file import StateFile
from fader_server.watch import Watcher
from tests.server.api.api_fakes import FakeAdapters, digest


class FakeLoader(FakeAdapters):
    """Loads when the gate is open; holds `room` names, the longest unused may be evicted."""

    def __init__(self, room: int = 100) -> None:
        super().__init__(("tone",))
        self.gate = asyncio.Event()
        self.gate.set()
        self.started = asyncio.Semaphore(0)
        self.room = room
        self.loads: list[str] = []
        self.failures: dict[str, Exception] = {}
        self.held: list[str] = []
        self.evicted: list[str] = []

    async def load(
        self, order: LoadOrder, *, make_room: Callable[[], bool] = lambda: False
    ) -> Loaded:
        self.loads.append(order.name)
        self.started.release()
        await self.gate.wait()
        if order.name in self.failures:
            raise self.failures[order.name]
        while order.name not in self.infos and len(self.infos) >= self.room:
            if not make_room():
                raise ArenaFull("no room")
        return await super().load(replace(order, source=order.source.removeprefix("/roots/")))

    def names(self) -> frozenset[str]:
        return frozenset(self.infos)

    def evict(self, may_go: Callable[[str], bool]) -> str | None:
        for name in self.infos:
            if name not in self.held and may_go(name):
                super().unload(name)
                self.evicted.append(name)
                return name
        return None


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def terms(*names: str) -> list[NamedTerm]:
    return [NamedTerm(AdapterRef(name), 1.0) for name in names]


def make(loader: FakeLoader, offered: Callable[[str], bool] = lambda name: True):
    clock, asked = Clock(), []

    def offers(name: str) -> bool:
        asked.append(name)
        return offered(name)

    parking = Parking(loader, fixed=frozenset({"tone"}), limit=1000)
    return OnDemand(parking, offers=offers, clock=clock), clock, asked


async def lease_all(adapters: OnDemand, *names: str) -> None:
    for name in names:
        (await adapters.lease(terms(name))).release()


async def test_a_missing_name_is_loaded_and_a_loaded_one_is_not_loaded_again():
    loader = FakeLoader()
    adapters, _, asked = make(loader)
    await lease_all(adapters, "tone", "new", "new", "org/tone")
    assert loader.loads == ["new", "org/tone"]
    assert asked == ["new", "org/tone"]
    assert loader.leases == 0


async def test_a_hundred_requests_share_one_load():
    loader = FakeLoader()
    loader.gate.clear()
    adapters, _, _ = make(loader)
    waiting = [asyncio.create_task(adapters.lease(terms("new"))) for _ in range(100)]
    await loader.started.acquire()
    loader.gate.set()
    leases = await asyncio.gather(*waiting)
    assert loader.loads == ["new"]
    assert loader.leases == 100
    for lease in leases:
        lease.release()


async def test_a_hundred_requests_share_one_failure_and_later_ones_cost_nothing():
    loader = FakeLoader()
    loader.failures["new"] = AdapterInvalid("lora_A is missing")
    adapters, clock, asked = make(loader)
    results = await asyncio.gather(
        *(adapters.lease(terms("new")) for _ in range(100)), return_exceptions=True
    )
    assert {type(result) for result in results} == {AdapterInvalid}
    assert len({id(result) for result in results}) == 100, "tracebacks of others"
    for _ in range(100):
        with pytest.raises(AdapterInvalid, match="lora_A"):
            await adapters.lease(terms("new"))
    assert (len(loader.loads), len(asked)) == (1, 1)
    clock.now += refusals.BROKEN_SECONDS
    del loader.failures["new"]
    await lease_all(adapters, "new")
    assert len(loader.loads) == 2


@pytest.mark.parametrize("error", [SourceUnavailable("later"), ArenaFull("no room")])
async def test_what_time_may_mend_is_tried_again_soon(error):
    loader = FakeLoader()
    loader.failures["new"] = error
    adapters, clock, _ = make(loader)
    for _ in range(3):
        with pytest.raises(type(error)):
            await adapters.lease(terms("new"))
    assert len(loader.loads) == 1
    clock.now += refusals.PASSING_SECONDS
    del loader.failures["new"]
    await lease_all(adapters, "new")


@pytest.mark.parametrize("error", [SourceForbidden("secret path"), SourceNotFound("secret path")])
async def test_forbidden_and_missing_look_the_same(error):
    loader = FakeLoader()
    loader.failures["new"] = error
    adapters, _, _ = make(loader, lambda name: name != "not-offered")
    told = set()
    for name in ("new", "new", "not-offered", "not-offered"):
        with pytest.raises(AdapterNotFound) as caught:
            await adapters.lease(terms(name))
        assert name in str(caught.value)
        told.add(str(caught.value).replace(name, "it"))
    assert len(told) == 1
    assert "secret" not in told.pop()
    assert loader.loads == ["new"]


async def test_a_flood_of_bad_names_loads_nothing_and_is_forgotten_in_bounds(monkeypatch):
    monkeypatch.setattr(refusals, "MAX_REFUSALS", 50)
    loader = FakeLoader()
    adapters, _, asked = make(loader, lambda name: False)
    for n in range(200):
        with pytest.raises(AdapterNotFound):
            await adapters.lease(terms(f"bad-{n}"))
    assert loader.loads == []
    assert len(adapters._bringing._refusals._kept) == 50
    assert len(adapters._bringing._flights) == 0
    with pytest.raises(AdapterNotFound):
        await adapters.lease(terms("bad-199"))
    assert len(asked) == 200


async def test_loads_at_one_time_are_bounded(monkeypatch):
    monkeypatch.setattr(bringing, "MAX_LOADS", 2)
    loader = FakeLoader()
    loader.gate.clear()
    adapters, _, _ = make(loader)
    waiting = [asyncio.create_task(adapters.lease(terms(name))) for name in ("a", "b")]
    await loader.started.acquire()
    await loader.started.acquire()
    with pytest.raises(Overloaded):
        await adapters.lease(terms("c"))
    loader.gate.set()
    for lease in await asyncio.gather(*waiting):
        lease.release()
    await lease_all(adapters, "c")  # not remembered against it


@pytest.mark.parametrize("other", ["quiet", "flood"])
async def test_loads_that_one_tenant_takes_up_keep_no_other_out(monkeypatch, other):
    monkeypatch.setattr(bringing, "MAX_LOADS", 2)
    loader = FakeLoader()
    loader.gate.clear()
    adapters, _, _ = make(loader)

    def ask(name: str, tenant: str) -> "asyncio.Task":
        return asyncio.create_task(adapters.lease(terms(name), tenant=tenant))

    flood = [ask(name, "flood") for name in ("a", "b")]
    for _ in flood:
        await loader.started.acquire()
    third, fourth = ask("c", other), ask("d", other)
    if other == "quiet":
        await loader.started.acquire()
        flood.append(third)
    for _ in range(10):  # turns of the loop: all have asked
        await asyncio.sleep(0)
    loader.gate.set()
    found = await asyncio.gather(third, fourth, return_exceptions=True)
    assert [isinstance(one, Overloaded) for one in found] == [other == "flood", True]
    for lease in await asyncio.gather(*flood):
        lease.release()
    assert adapters._bringing._loads.total == 0


async def test_looks_at_a_slow_disk_are_bounded_too(monkeypatch):
    monkeypatch.setattr(bringing, "MAX_LOADS", 2)
    slow = threading.Event()

    def offers(name: str) -> bool:
        slow.wait()
        return False

    parking = Parking(FakeLoader(), fixed=frozenset(), limit=100)
    adapters = OnDemand(parking, offers=offers)
    waiting = [asyncio.create_task(adapters.lease(terms(name))) for name in ("a", "b")]
    for _ in range(10):  # turns of the loop: both have begun
        await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await adapters.lease(terms("c"))
    slow.set()
    for one in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(one, AdapterNotFound)
    with pytest.raises(AdapterNotFound):
        await adapters.lease(terms("c"))  # there is room to look again


async def test_looks_at_a_slow_disk_take_no_thread_of_other_work():
    slow = threading.Event()

    def offers(name: str) -> bool:
        slow.wait()
        return False

    others = (os.cpu_count() or 1) + 4  # threads of a loop's own executor
    adapters = OnDemand(Parking(FakeLoader(), fixed=frozenset(), limit=100), offers=offers)
    looks = [asyncio.create_task(adapters.lease(terms(f"a{n}"))) for n in range(min(32, others))]
    try:
        await asyncio.sleep(0.05)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "encoded"), 5) == "encoded"
    finally:
        slow.set()
        await asyncio.gather(*looks, return_exceptions=True)


async def test_every_name_of_a_blend_is_loaded_and_one_failure_takes_no_lease():
    loader = FakeLoader()
    loader.failures["bad"] = AdapterInvalid("broken")
    adapters, _, _ = make(loader)
    lease = await adapters.lease(terms("a", "tone", "b"))
    assert sorted(loader.loads) == ["a", "b"]
    lease.release()
    with pytest.raises(AdapterInvalid):
        await adapters.lease(terms("a", "bad"))
    assert loader.leases == 0
    assert not +adapters._awaited


async def test_a_version_that_is_not_there_loads_nothing():
    loader = FakeLoader()
    adapters, _, _ = make(loader)
    with pytest.raises(AdapterNotFound):
        await adapters.lease([NamedTerm(AdapterRef("tone", "0" * 12), 1.0)])
    assert loader.loads == []


async def test_who_asked_first_may_leave_and_the_others_are_served():
    loader = FakeLoader()
    loader.gate.clear()
    adapters, _, _ = make(loader)
    first, second = (asyncio.create_task(adapters.lease(terms("new"))) for _ in range(2))
    await loader.started.acquire()
    first.cancel()
    loader.gate.set()
    (await second).release()
    assert loader.loads == ["new"]
    assert loader.leases == 0
    assert not +adapters._awaited


async def test_what_is_held_awaited_or_fixed_stays_and_what_came_on_demand_is_forgotten():
    loader = FakeLoader(room=4)
    adapters, _, _ = make(loader)
    await adapters.load(LoadOrder("mine", "one"))
    await lease_all(adapters, "a", "b")  # full: tone, mine, a, b
    loader.held = ["mine", "a"]
    await lease_all(adapters, "c")
    assert loader.evicted == ["b"]
    loader.held = ["mine", "a", "c"]
    with pytest.raises(ArenaFull):
        await adapters.lease(terms("d"))
    assert {info.name for info in adapters.list()} == {"tone", "mine", "a", "c"}
    loader.held = ["mine"]
    with pytest.raises(ArenaFull):  # both of its own names would have to go for the third
        await adapters.lease(terms("a", "c", "e"))


async def test_what_was_loaded_by_hand_keeps_its_name_when_it_loses_its_place():
    loader = FakeLoader(room=2)
    adapters, _, asked = make(loader, offered=lambda name: False)
    one = (await adapters.load(LoadOrder("one", "one"))).info
    await adapters.load(LoadOrder("two", "two"))
    assert loader.evicted == ["one"]
    assert adapters.get(AdapterRef("one")).tier == "disk"
    assert adapters.get(AdapterRef("one", one.version[:12])).version == one.version
    with pytest.raises(AdapterNotFound):
        adapters.get(AdapterRef("one", "0" * 12))
    assert [info.name for info in adapters.list()] == ["one", "tone", "two"]
    assert adapters.totals().adapters == 3
    (await adapters.lease(terms("one"))).release()
    assert loader.evicted == ["one", "two"]
    assert adapters.get(AdapterRef("one")).tier == "host"
    assert adapters.get(AdapterRef("one")).version == one.version
    assert asked == [], "known names need no offer"


async def test_a_parked_name_is_compared_swapped_pinned_and_unloaded_as_any_other():
    loader = FakeLoader(room=2)
    adapters, _, _ = make(loader)
    one = (await adapters.load(LoadOrder("one", "one"))).info
    await adapters.load(LoadOrder("two", "two"))  # one is parked
    with pytest.raises(VersionConflict):
        await adapters.load(LoadOrder("one", "new", if_version="0" * 12))
    with pytest.raises(VersionConflict):
        await adapters.load(LoadOrder("one", "new", if_version=""))
    with pytest.raises(AdapterExists):
        await adapters.load(LoadOrder("one", "new", replace=False))
    assert adapters.get(AdapterRef("one")).version == one.version
    assert adapters.pin("one", pinned=True).pinned
    swapped = await adapters.load(LoadOrder("one", "new", if_version=one.version[:12]))
    assert swapped.replaced == one.version  # and two is parked
    adapters.unload("two")
    with pytest.raises(AdapterNotFound):
        adapters.get(AdapterRef("two"))
    with pytest.raises(AdapterNotFound):
        adapters.unload("two")
    with pytest.raises(AdapterNotFound):
        await adapters.lease(terms("two"))


async def test_a_parked_name_whose_files_changed_is_refused_with_the_reason():
    loader = FakeLoader(room=2)
    adapters, clock, _ = make(loader)
    await adapters.load(LoadOrder("one", "one"))
    await adapters.load(LoadOrder("two", "two"))
    loader.failures["one"] = VersionConflict("the source holds another version")
    with pytest.raises(SourceUnavailable, match="load it anew"):
        await adapters.lease(terms("one"))
    assert adapters.get(AdapterRef("one")).tier == "disk"
    del loader.failures["one"]
    clock.now += refusals.PASSING_SECONDS
    await lease_all(adapters, "one")


@pytest.mark.parametrize("error", [SourceForbidden("secret"), SourceNotFound("secret")])
async def test_a_parked_name_never_looks_as_if_it_did_not_exist(error):
    loader = FakeLoader(room=2)
    adapters, clock, _ = make(loader)
    await adapters.load(LoadOrder("one", "one"))
    await adapters.load(LoadOrder("two", "two"))
    loader.failures["one"] = error
    for _ in range(2):  # the second one is told what the first one was
        with pytest.raises(SourceUnavailable, match="cannot be found again"):
            await adapters.lease(terms("one"))
    del loader.failures["one"]
    clock.now += refusals.PASSING_SECONDS
    await lease_all(adapters, "one")


async def test_a_look_that_fails_says_nothing_of_what_exists():
    broken = [True]

    def offered(name: str) -> bool:
        if broken:
            raise SourceUnavailable("EMFILE")
        return True

    loader = FakeLoader()
    adapters, clock, asked = make(loader, offered)
    with pytest.raises(SourceUnavailable):
        await adapters._bringing.offered("new", "")  # as one asks who may have to wait for room
    for _ in range(3):
        with pytest.raises(SourceUnavailable):
            await adapters.lease(terms("new"))
    assert asked == ["new"]
    broken.clear()
    clock.now += refusals.PASSING_SECONDS
    await lease_all(adapters, "new")


async def test_names_are_bounded_parked_or_not():
    loader = FakeLoader(room=2)
    adapters = OnDemand(Parking(loader, fixed=frozenset({"tone"}), limit=3), offers=lambda n: False)
    for name in "abcd":
        await adapters.load(LoadOrder(name, name))
    with pytest.raises(ArenaFull, match="limit"):
        await adapters.load(LoadOrder("e", "e"))
    adapters.unload("a")
    await adapters.load(LoadOrder("e", "e"))


class Roots:
    """Two folders, one of which is no adapter."""

    def discover(self) -> list[Found]:
        return [Found(name, name, (1,), complete=True) for name in ("watched", "broken")]

    def holds(self, reference: str) -> bool:
        return True


async def test_every_load_is_counted_whoever_asked_for_it(tmp_path):
    loader, metrics = FakeLoader(), Metrics()
    loader.failures["broken"] = AdapterInvalid("lora_A is missing")
    parking = Parking(loader, fixed=frozenset(), limit=100)
    adapters = OnDemand(parking, offers=lambda name: True, told=metrics.loaded)

    def counted() -> tuple[int, int]:
        lines = dict(line.rsplit(" ", 1) for line in metrics.render().decode().splitlines())
        loads = "fader_adapter_loads_total"
        ok, refused = (int(float(lines[f'{loads}{{result="{r}"}}'])) for r in ("ok", "refused"))
        assert float(lines['fader_adapter_load_seconds_count{tier="host"}']) == ok + refused
        return ok, refused

    await adapters.load(LoadOrder("by-hand", "by-hand"))
    with pytest.raises(AdapterInvalid):
        await adapters.load(LoadOrder("broken", "broken"))
    assert counted() == (1, 1)
    await lease_all(adapters, "on-demand")
    assert counted() == (2, 1)
    await Watcher(adapters, Roots(), seen={}, reserved=()).look()
    assert counted() == (3, 2)
    wanted = {"a": Wanted("a", None, digest("a"), False), "b": None}
    kept = RememberedAdapters(adapters, StateFile(tmp_path), State(wanted))
    await kept.restore()
    kept.close()
    assert counted() == (4, 2)


async def test_two_names_that_take_turns_in_one_place_are_both_served():
    loader = FakeLoader(room=2)
    adapters, clock, _ = make(loader)
    for name in ("a", "b") * 10:
        await lease_all(adapters, name)
        clock.now += 1
    assert loader.evicted == ["a", "b"] * 9 + ["a"]


async def test_an_administrators_load_makes_room_too():
    loader = FakeLoader(room=2)
    adapters, _, _ = make(loader)
    await lease_all(adapters, "a")
    await adapters.load(LoadOrder("given", "one"))
    assert loader.evicted == ["a"]
    assert [info.name for info in adapters.list()] == ["given", "tone"]
    loader.held = ["given"]
    with pytest.raises(ArenaFull):
        await adapters.lease(terms("a"))


async def test_an_unloaded_name_stays_gone_until_it_is_loaded_by_hand():
    loader = FakeLoader()
    adapters, clock, _ = make(loader)
    await lease_all(adapters, "new")
    adapters.unload("new")
    clock.now += 1e6
    with pytest.raises(AdapterNotFound):
        await adapters.lease(terms("new"))
    assert loader.loads == ["new"]
    await adapters.load(LoadOrder("new", "new"))
    await lease_all(adapters, "new")
    adapters.unload("new")
    with pytest.raises(AdapterNotFound):
        await adapters.lease(terms("new"))


async def test_an_unload_during_the_load_wins():
    loader = FakeLoader()
    loader.gate.clear()
    adapters, _, _ = make(loader)
    waiting = asyncio.create_task(adapters.lease(terms("new")))
    await loader.started.acquire()
    with pytest.raises(AdapterNotFound):
        adapters.unload("new")
    loader.gate.set()
    with pytest.raises(AdapterNotFound):
        await waiting
    assert "new" not in loader.infos


async def test_a_load_by_hand_meanwhile_is_used_and_not_ours():
    loader = FakeLoader(room=2)
    loader.gate.clear()
    adapters, _, _ = make(loader)
    waiting = asyncio.create_task(adapters.lease(terms("new")))
    await loader.started.acquire()
    await FakeAdapters.load(loader, LoadOrder("new", "by-hand"))
    adapters._bringing.mine.discard("new")  # what OnDemand.load does when it returns
    loader.gate.set()
    (await waiting).release()
    assert loader.infos["new"].source == "/roots/by-hand"
    await lease_all(adapters, "other")
    assert adapters.get(AdapterRef("new")).tier == "disk", "its name is not ours to forget"
