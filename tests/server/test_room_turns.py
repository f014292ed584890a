"""The turn for room goes round the tenants: a flood of one keeps no other waiting or out."""

import asyncio
import random
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack

import pytest

from fader_server.engine.loop import Engine
from fader_server.errors import Overloaded, TenantBusy
from fader_server.room import Line, Place
from tests.server.engine.engine_world import World, request
from tests.server.room_world import Served, settled


class ByArrival(Line):
    """The control: whose place was taken first is next."""

    def _call_first(self) -> None:
        if self._first is None and self._places:
            self._first = next(iter(self._places.values()))
            self._whose = next(iter(self._first.waiting))
            self._first.first.set()


class Waiters:
    """Who stands in a line. Nothing lies in the way of the first: it goes when it is told to."""

    def __init__(
        self,
        kind: type[Line] = Line,
        *,
        longest: int = 1000,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.line = kind(lambda wanted, slow: None, longest=longest)
        self.line.share(weights or {})
        self.stands: dict[str, tuple[ExitStack, Place]] = {}

    def join(self, tenant: str, *names: str) -> None:
        for name in names:
            stack = ExitStack()
            joined = self.line.joined(frozenset({name}), None, tenant=tenant)
            self.stands[f"{tenant}:{name}"] = stack, stack.enter_context(joined)

    def leave(self, who: str) -> None:
        self.stands.pop(who)[0].close()

    def first(self) -> list[str]:
        """Who may go now: all of one place."""
        return [who for who, (_, place) in self.stands.items() if place.first.is_set()]

    def serve(self, most: int = 1000) -> list[str]:
        """So many turns, in order."""
        served: list[str] = []
        while self.stands and len(served) < most:
            now = self.first()
            assert now, "somebody waits and nobody is first"
            for who in now:
                self.leave(who)
            served += now
        return served


def numbered(letter: str, count: int) -> list[str]:
    return [f"{letter}{n}" for n in range(count)]


def test_the_turn_goes_round_and_by_arrival_within_a_tenant():
    waiters = Waiters()
    waiters.join("a", *numbered("a", 4))
    waiters.join("b", *numbered("b", 2))
    waiters.join("c", "c0")
    assert waiters.serve() == ["a:a0", "b:b0", "c:c0", "a:a1", "b:b1", "a:a2", "a:a3"]


@pytest.mark.parametrize("kind", [Line, ByArrival])
def test_who_asks_now_and_then_waits_for_one_turn_of_a_flood(kind):
    waiters = Waiters(kind)
    waiters.join("flood", *numbered("a", 100))
    waits = []
    for n in range(10):
        waiters.serve(3)
        waiters.join("quiet", f"q{n}")
        served = waiters.serve(200 if kind is ByArrival else 2)
        waits.append(served.index(f"quiet:q{n}"))
        waiters.join("flood", *numbered(f"more{n}-", 3))
    assert (max(waits) <= 1) == (kind is Line), "the control waits behind the flood"


def test_time_without_a_request_is_not_saved_up():
    waiters = Waiters()
    waiters.join("a", *numbered("a", 60))
    waiters.join("b", "b0")
    waiters.serve(40)
    waiters.join("b", *numbered("b", 20))
    shares = Counter(who[0] for who in waiters.serve(20))
    assert shares == {"a": 10, "b": 10}


def test_turns_are_by_weight_and_new_weights_hold_from_the_next_turn_on():
    waiters = Waiters(weights={"a": 3.0})
    for tenant in ("a", "b"):
        waiters.join(tenant, *numbered(tenant, 100))
    shares = Counter(who[0] for who in waiters.serve(40))
    assert shares == {"a": 30, "b": 10}
    waiters.line.share({"b": 3.0})
    shares = Counter(who[0] for who in waiters.serve(40))
    assert 9 <= shares["a"] <= 11


def test_who_is_first_stays_it_and_a_place_of_two_tenants_is_one_turn():
    waiters = Waiters()
    waiters.join("a", "x", "y")
    waiters.join("b", "z")
    waiters.join("c", "y")
    assert waiters.first() == ["a:x"]
    waiters.leave("a:x")
    assert waiters.first() == ["b:z"]
    waiters.leave("b:z")
    assert waiters.first() == ["a:y", "c:y"]
    waiters.leave("c:y")
    assert waiters.first() == ["a:y"], "whose turn it was left, who stays goes on"
    waiters.leave("a:y")
    assert waiters.line.waiting == 0


def test_who_leaves_before_its_turn_does_not_pay_for_it():
    waiters = Waiters()
    waiters.join("a", *numbered("a", 6))
    waiters.join("b", *numbered("b", 6))
    for n in range(5):
        waiters.leave(f"b:b{n}")
    assert waiters.serve(2) == ["a:a0", "b:b5"]


def test_a_line_that_one_fills_takes_the_equal_part_of_another():
    waiters = Waiters(longest=10)
    waiters.join("flood", *numbered("a", 10))
    with pytest.raises(Overloaded):
        waiters.join("flood", "a10")
    waiters.join("quiet", *numbered("q", 5))
    for tenant in ("flood", "quiet"):
        with pytest.raises(Overloaded):
            waiters.join(tenant, "more")
    waiters.join("third", *numbered("t", 3))
    with pytest.raises(Overloaded):
        waiters.join("third", "t3")
    assert len(waiters.serve()) == 18
    waiters.join("flood", *numbered("a", 10))


@pytest.mark.parametrize("seed", range(5))
def test_no_tenant_is_ever_more_than_a_round_behind(seed):
    choose = random.Random(seed)
    tenants = numbered("t", 5)
    waiters = Waiters()
    waited: Counter[str] = Counter()
    for step in range(300):
        for tenant in tenants:
            if choose.random() < 0.3:
                waiters.join(tenant, *numbered(f"{tenant}{step}-", choose.randint(1, 4)))
        if waiters.stands and choose.random() < 0.2:
            waiters.leave(choose.choice(list(waiters.stands)))
        if not waiters.stands:
            continue
        (served,) = waiters.serve(1)
        waiting = {who.split(":")[0] for who in waiters.stands}
        for tenant in waiting - {served.split(":")[0]}:
            waited[tenant] += 1
        waited[served.split(":")[0]] = 0
        for tenant in tenants:
            waited[tenant] *= tenant in waiting
        assert max(waited.values()) <= 2 * len(tenants), waited
    waiters.serve()
    assert not waiters.line._clocks, "what an empty line knows is forgotten"


async def test_a_quiet_tenant_is_served_after_the_turn_under_way():
    served = Served(4)
    names = [f"{name}-4" for name in ("a", "b", "c", "d", "q")]
    await served.load(*names)
    held = await served.lease("a-4", tenant="flood")
    flood = [served.asked(name, tenant="flood") for name in ("b-4", "c-4", "d-4")]
    assert await settled(*flood) == [False] * 3
    quiet = served.asked("q-4", tenant="quiet")
    await settled()
    held.release()
    (await flood[0]).release()
    (await quiet).release()
    assert [task.done() for task in flood] == [True, False, False]
    for task in flood[1:]:
        (await task).release()
    assert served.at_rest


async def test_what_waits_for_room_counts_among_its_tenants_waiting_requests():
    world = World()
    engine = Engine(
        world.scheduler, world.device, world.device.upload,
        max_waiting_of={"x": 2}, clock=lambda: 0.0,
    )  # fmt: skip
    served = Served(4, counted=engine.counted)
    await served.load("a-4", "b-4", "c-4")
    held = await served.lease("a-4")
    waiting = [served.asked(name, tenant="x") for name in ("b-4", "c-4")]
    other = served.asked("b-4", tenant="y")
    await settled(*waiting)
    seen = engine.stats().tenants
    assert {tenant: stats.waiting for tenant, stats in seen.items()} == {"x": 2, "y": 1}
    with pytest.raises(TenantBusy, match="2 requests of yours"):
        await served.lease("b-4", tenant="x")
    with pytest.raises(TenantBusy):
        engine.submit(request("x1", range(4), tenant="x"), lambda event: None)
    waiting.pop().cancel()
    await asyncio.sleep(0)
    engine.submit(request("x1", range(4), tenant="x"), lambda event: None)
    with pytest.raises(TenantBusy):
        await served.lease("c-4", tenant="x")
    held.release()
    for lease in await asyncio.gather(*waiting, other):
        lease.release()
    engine.submit(request("x2", range(4), tenant="x"), lambda event: None)
    assert engine.stats().tenants["x"].waiting == 2
    assert "y" not in engine.stats().tenants
    assert served.at_rest
