"""Tenants beside each other: nobody starves, nobody pays for idle time, nobody has too much."""

from collections import Counter, deque

import pytest

from fader_server.engine.line import Line
from fader_server.engine.loop import Engine
from fader_server.engine.shares import Share
from fader_server.errors import Overloaded, TenantBusy
from tests.server.engine.engine_world import World, blend_of, by_arrival, request


def flood(
    world: World, tenant: str, count: int, *, start: int = 0, length: int = 4, **more
) -> None:
    for i in range(start, start + count):
        own = {"max_tokens": 4} | more
        world.submit(request(f"{tenant}{i}", range(i, i + length), tenant=tenant, **own))


def first_turns(world: World) -> list[str]:
    """Requests in the order in which they began to run."""
    found: dict[str, None] = {}
    for plan in world.device.plans:
        found |= dict.fromkeys(row.sequence.request.id for row in plan.rows)
    return list(found)


def tokens(world: World, since: int = 0) -> Counter[str]:
    """Computed for every tenant from a plan on."""
    rows = [row for plan in world.device.plans[since:] for row in plan.rows]
    found: Counter[str] = Counter()
    for row in rows:
        found[row.sequence.request.tenant] += row.count
    return found


def turn(world: World, count: int) -> None:
    for _ in range(count):
        world.turn()
        world.check()


def late(world: World) -> int:
    """How many of a flood begin after another tenant has asked and before it begins."""
    flood(world, "x", 60)
    turn(world, 7)
    before = len(first_turns(world))
    world.submit(request("y", range(5), tenant="y"))
    world.finish()
    return first_turns(world).index("y") - before


def test_who_comes_into_a_flood_is_next():
    assert late(World()) == 0


def test_first_come_first_served_would_be_noticed(monkeypatch):
    monkeypatch.setattr(Line, "in_turn", by_arrival)
    assert late(World()) > 40


@pytest.mark.parametrize("weight", [1.0, 2.0, 4.0])
def test_tenants_that_always_wait_get_tokens_by_their_weights(weight):
    world = World(shares={"y": Share(weight=weight)})
    flood(world, "x", 300)
    flood(world, "y", 300, length=2, max_tokens=9)
    turn(world, 120)
    found = tokens(world)
    assert found["y"] / found["x"] == pytest.approx(weight, rel=0.15)


def test_idle_time_is_not_saved_up():
    world = World()
    flood(world, "x", 300)
    turn(world, 100)
    since = len(world.device.plans)
    flood(world, "y", 300)
    turn(world, 100)
    found = tokens(world, since)
    assert found["y"] / found["x"] == pytest.approx(1.0, rel=0.15)
    assert tokens(world)["y"] < tokens(world)["x"] / 2


def beside_a_little(come: str, **shares: Share) -> float:
    """Tokens of a tenant that was busy for long, over those of one that floods by now: `come`, or
    the one of which one request always ran, or waited for its own share."""
    world = World(max_rows=4, shares=shares)
    flood(world, "x", 700)
    for i in range(60):
        flood(world, "y", 2 if shares else 1, start=i * 2, max_tokens=8)
        turn(world, 5)
    flood(world, come, 300, start=400)
    since = len(world.device.plans)
    turn(world, 60)
    found = tokens(world, since)
    return found["x"] / found[come]


@pytest.mark.parametrize("come", ["y", "z"])
def test_little_work_is_not_saved_up_either(come):
    assert beside_a_little(come) == pytest.approx(1.0, rel=0.25)


def test_nor_is_waiting_for_ones_own_share():
    assert beside_a_little("z", y=Share(most=0.25)) == pytest.approx(1.0, rel=0.25)


def test_clocks_that_only_those_move_who_run_would_be_noticed(monkeypatch):
    def join(line, sequence):
        line._clocks.setdefault(sequence.request.tenant, 0.0)
        line._queues.setdefault(sequence.request.tenant, deque()).append(sequence)

    monkeypatch.setattr(Line, "join", join)
    assert beside_a_little("y") < 0.1
    assert beside_a_little("z") < 0.1


def test_what_one_had_alone_is_not_held_against_it():
    world = World()
    flood(world, "x", 1, max_tokens=40)
    turn(world, 30)  # tokens that nobody else asked for
    flood(world, "y", 30)
    flood(world, "x", 30, start=1)
    since = len(world.device.plans)
    turn(world, 30)
    assert tokens(world, since)["x"] >= tokens(world, since)["y"] * 0.85


def rows_now(world: World, tenant: str) -> int:
    return world.scheduler.tenants()[tenant].running


def rows(world: World, tenant: str) -> int:
    """The most that it had in any step."""
    counts = [sum(r.sequence.request.tenant == tenant for r in p.rows) for p in world.device.plans]
    return max(counts)


def test_a_tenant_alone_has_every_row_but_for_its_share():
    for share, most in ((1.0, 4), (0.5, 2), (0.1, 1)):
        world = World(shares={"x": Share(most=share)})
        flood(world, "x", 12)
        world.finish()
        assert rows(world, "x") == most


def test_who_waits_for_its_own_share_keeps_nobody_waiting():
    world = World(shares={"x": Share(most=0.5)})
    flood(world, "x", 100)
    flood(world, "y", 2, max_tokens=9)
    turn(world, 6)
    assert rows(world, "x") == rows(world, "y") == 2


def test_blocks_are_shared_by_what_a_request_may_grow_to():
    world = World(blocks=21, shares={"x": Share(most=0.5)})  # 10 of 20 blocks of 4 tokens
    flood(world, "x", 12, length=4, max_tokens=16)  # up to 5 blocks each
    flood(world, "y", 2, length=4, max_tokens=16)
    turn(world, 12)
    assert rows(world, "x") == 2
    assert rows(world, "y") == 2
    world.finish()


def test_one_request_that_is_larger_than_the_share_runs_alone():
    world = World(blocks=21, shares={"x": Share(most=0.2)})
    flood(world, "x", 3, length=8, max_tokens=40)
    world.finish()
    assert rows(world, "x") == 1
    assert all(seen.finish == "length" for seen in world.seen.values())


def test_adapters_memory_is_shared_too():
    world = World(capacity=4, shares={"x": Share(most=0.5)})
    for i in range(8):
        for tenant in "xy":
            blend = blend_of((f"{tenant}{i}", 1.0))
            world.submit(request(f"{tenant}{i}", range(5), blend=blend, tenant=tenant))
    world.finish()
    assert rows(world, "x") == 2
    world = World(capacity=4, shares={"x": Share(most=0.5)})
    flood(world, "x", 8, blend=blend_of(("one", 1.0)))
    world.finish()
    assert rows(world, "x") == 2, "of four rows"


def test_a_stream_that_was_sent_back_goes_before_who_never_ran():
    world = World(blocks=9, max_rows=4)
    flood(world, "x", 4, length=4, max_tokens=20)
    turn(world, 8)
    flood(world, "y", 1)
    while not world.scheduler.preemptions:
        turn(world, 1)
    line = [s.request.id for s in world.scheduler._roster.waiting]
    assert line[0].startswith("x")
    assert line[-1] == "y0"
    world.finish()


def test_steps_begin_ahead_beside_who_waits_for_its_own_share():
    led = []
    for most in (0.5, 1.0):
        world = World(ahead=True, max_rows=4, shares={"x": Share(most=most)})
        flood(world, "x", 3, max_tokens=12)
        for _ in range(6):
            world.turn()
        led.append(world.device.led)
        world.finish()
    waiting_for_its_share, nobody_waits = led
    assert 0 < waiting_for_its_share <= nobody_waits + 1


def test_a_tenants_queue_is_full_before_the_servers():
    world = World()
    engine = Engine(
        world.scheduler,
        world.device,
        world.device.upload,
        max_waiting=12,
        max_waiting_of={"x": 3},
        clock=lambda: 0.0,
    )

    def ask(tenant: str, number: int, *, further: bool = False) -> None:
        one = request(f"{tenant}{number}", range(4), tenant=tenant)
        engine.submit(one, lambda event: None, further=further)

    for i in range(3):
        ask("x", i)
    with pytest.raises(TenantBusy, match="3 requests of yours"):
        ask("x", 3)
    ask("x", 3, further=True)  # of a call that was accepted
    for i in range(8):
        ask("y", i)
    with pytest.raises(Overloaded):
        ask("y", 8, further=True)
    engine.abort("x3")
    assert engine.stats().waiting == 12
    engine._turn()
    for i in range(4, 6):
        ask("x", i)
    stats = engine.stats().tenants
    assert stats["x"].running + stats["x"].waiting == 5
    assert stats["x"].tokens >= 4
    while engine._turn():
        pass
    assert {t: (s.running, s.waiting) for t, s in engine.stats().tenants.items()} == {
        "x": (0, 0),
        "y": (0, 0),
    }


def test_other_shares_hold_from_the_next_admission_on():
    world = World(shares={"x": Share(most=0.5)})
    flood(world, "x", 100)
    turn(world, 6)
    assert rows(world, "x") == 2
    world.scheduler.share({})
    turn(world, 6)
    assert rows(world, "x") == 4
    flood(world, "y", 100)
    world.scheduler.share({"y": Share(weight=4.0), "x": Share(most=0.25)})
    while rows_now(world, "x") > 1:
        world.turn()  # those that run have more than it may have now
    since = len(world.device.plans)
    turn(world, 20)
    last = world.device.plans[since:]
    assert max(sum(r.sequence.request.tenant == "x" for r in p.rows) for p in last) == 1
    assert tokens(world, since)["y"] > 2 * tokens(world, since)["x"]
