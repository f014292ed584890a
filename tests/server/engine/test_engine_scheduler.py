import dataclasses

import pytest

from fader_adapters.errors import AdapterTooLarge
from fader_server.core import Plan, RowResult
from fader_server.engine.limits import Limits
from fader_server.errors import (
    ConfigInvalid,
    ContextTooLong,
    EngineFault,
    NumericFault,
    RequestInvalid,
)
from tests.server.engine.engine_world import World, blend_of, expected, request, version

LONG = tuple(range(30))


def spans(plan: Plan | None) -> list[tuple[str, int, int]]:
    assert plan is not None
    return [(r.sequence.request.id, r.start, r.count) for r in plan.rows]


def step(world: World) -> list[tuple[str, int, int]]:
    """One turn; the rows it ran."""
    before = len(world.device.plans)
    world.turn()
    world.check()
    return [span for plan in world.device.plans[before:] for span in spans(plan)]


def chunks(world: World, name: str) -> list[tuple[int, int]]:
    return [
        (r.start, r.count)
        for plan in world.device.plans
        for r in plan.rows
        if r.sequence.request.id == name
    ]


def test_a_request_runs_to_its_length_and_leaves_nothing_behind():
    world = World()
    seen = world.submit(request("a", LONG, max_tokens=6))
    world.finish()
    assert seen.tokens == expected(seen.request)
    assert (seen.finish, len(seen.tokens)) == ("length", 6)


def test_limits_that_cannot_hold_a_chunk_beside_every_row_are_refused():
    Limits(max_rows=8, chunk_size=8, max_step_tokens=16)
    with pytest.raises(ConfigInvalid, match="max-step-tokens"):
        Limits(max_rows=8, chunk_size=8, max_step_tokens=15)


REFUSED = {
    "empty": (request("x", ()), RequestInvalid, "at least one token"),
    "context": (request("x", range(60), max_tokens=5), ContextTooLong, "length is 64 tokens"),
    "token id": (request("x", (1, -1)), RequestInvalid, "vocabulary"),
    "max_tokens": (request("x", (1,), max_tokens=-1), RequestInvalid, "max_tokens"),
    "no data": (
        dataclasses.replace(request("x", (1,), blend=blend_of(("a", 1.0))), adapters={}),
        RequestInvalid,
        "without its data",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_can_never_be_served_is_refused_at_once(kind):
    bad, error, message = REFUSED[kind]
    world = World()
    with pytest.raises(error, match=message):
        world.scheduler.add(bad)
    assert world.scheduler.waiting == 0


def test_more_tokens_than_the_whole_pool_holds_are_refused_at_once():
    world = World(blocks=5)  # 16 tokens
    with pytest.raises(ContextTooLong, match="16 tokens"):
        world.scheduler.add(request("x", range(14), max_tokens=3))
    world.submit(request("x", range(13), max_tokens=3))
    world.finish()


def test_an_id_in_use_is_refused():
    world = World()
    world.submit(request("a", LONG))
    with pytest.raises(RequestInvalid, match="in use"):
        world.scheduler.add(request("a", LONG))
    world.finish()
    world.scheduler.add(request("a", LONG))


def test_decode_never_waits_for_a_long_prompt():
    world = World(max_model_len=150, blocks=100)
    world.submit(request("chat", (1, 2, 3), max_tokens=12))
    step(world)
    world.submit(request("book", range(100), max_tokens=1))
    for _ in range(11):
        rows = step(world)
        assert rows[0][0] == "chat", "the decode row comes first, in every step"
        assert ("book" in [r[0] for r in rows]) == (world.seen["book"].ends == 0 or len(rows) == 2)
    assert world.seen["chat"].finish == "length"


def test_chunks_end_at_the_same_places_whatever_shares_their_steps():
    alone = World(max_rows=6, blocks=200)
    alone.submit(request("x", LONG))
    alone.finish()
    assert chunks(alone, "x")[:4] == [(0, 8), (8, 8), (16, 8), (24, 6)]
    for others in range(1, 6):
        crowd = World(max_rows=6, blocks=200)
        for i in range(others):
            crowd.submit(request(f"o{i}", range(i, 17 + i), max_tokens=9, salt=str(i)))
        crowd.submit(request("x", LONG))
        crowd.finish()
        assert chunks(crowd, "x") == chunks(alone, "x")


def test_a_chunk_that_does_not_fit_whole_waits_while_a_smaller_one_goes():
    world = World(max_rows=4, chunk_size=8, max_step_tokens=12)
    for name, length in (("a", 8), ("b", 6), ("c", 4)):
        world.submit(request(name, range(length), max_tokens=2, salt=name))
    assert step(world) == [("a", 0, 8)]
    assert step(world) == [("a", 8, 1), ("b", 0, 6), ("c", 0, 4)]
    world.finish()


def test_a_step_never_exceeds_its_budget_or_its_rows():
    world = World(max_rows=3, chunk_size=8, max_step_tokens=13, blocks=200)
    for i in range(9):
        world.submit(request(f"r{i}", range(i, i + 5 * (i % 4) + 1), max_tokens=1 + i))
    world.finish()
    assert max(plan.tokens for plan in world.device.plans) <= 13
    assert max(len(plan.rows) for plan in world.device.plans) <= 3


def test_a_running_prefill_waits_for_a_step_that_holds_its_whole_chunk():
    world = World(max_rows=3, chunk_size=8, max_step_tokens=16, blocks=100)
    world.submit(request("warm", range(5), max_tokens=1, salt="b"))
    world.finish()
    world.submit(request("d", (1,), max_tokens=20))
    step(world)
    world.submit(request("a", range(20)))
    world.submit(request("b", range(20), salt="b"))
    assert step(world) == [("d", 1, 1), ("a", 0, 8), ("b", 4, 4)]
    assert step(world) == [("d", 2, 1), ("a", 8, 8)]
    assert step(world) == [("d", 3, 1), ("a", 16, 4), ("b", 8, 8)]
    world.finish()


def test_requests_are_admitted_in_the_order_of_arrival():
    world = World(max_rows=2, blocks=100)
    for i in range(6):
        world.submit(request(f"r{i}", range(i, i + 3), max_tokens=3))
    world.finish()
    assert list(dict.fromkeys(s[0] for p in world.device.plans for s in spans(p))) == [
        f"r{i}" for i in range(6)
    ]


def test_the_same_prompt_is_computed_once_per_blend():
    world = World(blocks=100)
    for name, blend in (("a", blend_of(("x", 1.0))), ("b", blend_of(("x", 0.5)))):
        first = world.submit(request(name, LONG, blend=blend))
        world.finish()
        again = world.submit(request(f"{name}2", LONG, blend=blend))
        world.finish()
        assert (first.cached, again.cached) == (0, 28)


def test_at_least_the_last_prompt_token_is_computed():
    world = World(blocks=100)
    world.submit(request("a", range(16)))
    world.finish()
    seen = world.submit(request("b", range(16)))
    world.finish()
    assert seen.cached == 12
    assert chunks(world, "b")[0] == (12, 4)


def test_a_prefix_is_not_shared_before_the_step_that_wrote_it_is_committed():
    world = World(blocks=100, max_step_tokens=40)
    world.submit(request("a", range(8)))
    world.submit(request("b", range(8)))
    assert step(world) == [("a", 0, 8), ("b", 0, 8)]
    world.submit(request("c", range(8)))
    assert ("c", 4, 4) in step(world)
    world.finish()


def test_prompt_logprobs_come_in_chunks_and_never_from_the_cache():
    world = World(blocks=100)
    world.submit(request("warm", LONG))
    world.finish()
    seen = world.submit(request("a", LONG, prompt_logprobs=0))
    world.finish()
    assert len(seen.scores) == 29
    assert seen.cached == 0
    reader = world.submit(request("b", LONG))
    world.finish()
    assert reader.cached == 28


def test_no_token_is_drawn_when_none_is_wanted():
    world = World()
    seen = world.submit(request("a", LONG, prompt_logprobs=0, max_tokens=0))
    plain = world.submit(request("b", (1,), max_tokens=0))
    world.finish()
    assert (seen.tokens, seen.finish, len(seen.scores)) == ([], "length", 29)
    assert (plain.tokens, plain.finish) == ([], "length")


def test_a_stop_token_ends_the_request_but_not_before_min_tokens():
    free = expected(request("a", (1, 2), max_tokens=8))
    stop = frozenset({free[2]})
    world = World()
    early = world.submit(request("a", (1, 2), max_tokens=8, stop_token_ids=stop))
    late = world.submit(request("b", (1, 2), max_tokens=8, stop_token_ids=stop, min_tokens=3))
    world.finish()
    first = free.index(free[2])
    assert (early.finish, early.tokens) == ("stop", free[: first + 1])
    assert late.tokens[:3] == free[:3]
    assert len(late.tokens) > 3


def test_a_preempted_request_goes_on_with_the_tokens_it_would_have_had():
    world = World(blocks=12, max_rows=4)
    for i in range(4):
        world.submit(request(f"r{i}", range(i, i + 5), max_tokens=20, prompt_logprobs=0))
    world.finish()
    assert world.scheduler.preemptions > 0
    roomy = World(blocks=100, max_rows=4)
    for i in range(4):
        roomy.submit(request(f"r{i}", range(i, i + 5), max_tokens=20, prompt_logprobs=0))
    roomy.finish()
    assert roomy.scheduler.preemptions == 0
    for name, seen in roomy.seen.items():
        assert world.seen[name].tokens == seen.tokens


def test_the_newest_is_preempted_and_comes_back_first():
    world = World(blocks=9, max_rows=2)
    world.submit(request("old", range(8), max_tokens=20))
    world.submit(request("new", range(10, 18), max_tokens=20))
    world.submit(request("late", range(9), max_tokens=1, salt="x"))
    while not world.scheduler.preemptions:
        step(world)
    assert [s.request.id for s in world.scheduler._roster.waiting] == ["new", "late"]
    assert [s.request.id for s in world.scheduler._roster.running] == ["old"]
    world.finish()


def test_what_is_not_finite_costs_only_its_request_and_is_never_found_again():
    world = World(blocks=100)
    bad, good = request("bad", LONG, salt="s"), request("good", LONG, max_tokens=9)
    world.device.nan.add("bad")
    world.submit(bad)
    world.submit(good)
    world.finish()
    assert isinstance(world.seen["bad"].error, NumericFault)
    assert world.seen["good"].tokens == expected(good)
    after = world.submit(request("after", LONG, salt="s"))
    world.finish()
    assert after.cached == 0


def test_a_request_whose_adapter_has_no_room_lets_others_by_but_not_forever():
    world = World(capacity=2, max_rows=3, max_overtakes=2, blocks=100)
    world.submit(request("runs", (1,), blend=blend_of(("a", 1.0)), max_tokens=30))
    step(world)
    sizes = {version("big"): 2}
    world.submit(request("big", (1,), blend=blend_of(("big", 1.0)), sizes=sizes))
    for i in range(4):
        world.submit(request(f"r{i}", (1,), max_tokens=2))
    order: list[str] = []
    while world.turn():
        order += [s.request.id for s in world.scheduler._roster.running]
    world.check_end()
    assert list(dict.fromkeys(order)) == ["runs", "r0", "r1", "big", "r2", "r3"]


def order_of(world: World) -> list[str]:
    """Requests by their first step, each once."""
    plans = world.device.plans
    return list(dict.fromkeys(row.sequence.request.id for plan in plans for row in plan.rows))


def alternate(world: World, count: int) -> None:
    """a0 b1 a2 b3 …: two adapters where only one fits."""
    for i in range(count):
        name = "ab"[i % 2]
        world.submit(request(f"{name}{i}", (1,), blend=blend_of((name, 1.0)), max_tokens=2))
    world.finish()


def test_requests_are_grouped_by_what_is_on_the_device():
    world = World(capacity=1, max_rows=1, max_overtakes=8)
    alternate(world, 8)
    assert order_of(world) == ["a0", "a2", "a4", "a6", "b1", "b3", "b5", "b7"]
    assert sum(len(plan.uploads) for plan in world.device.plans) == 2


def test_nobody_is_overtaken_for_residency_more_often_than_allowed():
    world = World(capacity=1, max_rows=1, max_overtakes=2)
    alternate(world, 8)
    assert order_of(world) == ["a0", "a2", "a4", "b1", "b3", "b5", "b7", "a6"]
    strict = World(capacity=1, max_rows=1, max_overtakes=0)
    alternate(strict, 8)
    assert order_of(strict) == [f"{'ab'[i % 2]}{i}" for i in range(8)]


def test_grouping_costs_nothing_where_rows_are_free():
    world = World(capacity=2, max_rows=4)
    for name in "ab":
        world.submit(request(name, (1,), blend=blend_of((name, 1.0)), max_tokens=2))
    world.finish()
    third = world.submit(request("c", (1,), blend=blend_of(("c", 1.0)), max_tokens=9))
    again = world.submit(request("d", (1,), blend=blend_of(("b", 1.0)), max_tokens=9))
    step(world)
    assert world.scheduler.running == 2, "the adapter that nobody uses left for the new one"
    world.finish()
    assert (third.finish, again.finish) == ("length", "length")


def test_an_adapter_that_can_never_fit_is_refused_at_once():
    world = World(capacity=2)
    sizes = {version("huge"): 3}
    with pytest.raises(AdapterTooLarge):
        world.submit(request("h", (1,), blend=blend_of(("huge", 1.0)), sizes=sizes))
    both = blend_of(("a", 1.0), ("b", 1.0), ("c", 1.0))
    with pytest.raises(AdapterTooLarge):
        world.submit(request("b", (1,), blend=both))
    assert world.scheduler.waiting == 0
    assert world.submit(request("o", (1,), blend=blend_of(("a", 1.0)))).finish is None
    world.finish()


def test_a_fault_of_the_pool_fails_its_request_only():
    world = World()
    world.pool.fail_acquires = 1
    hit = world.submit(request("h", (1,), blend=blend_of(("a", 1.0))))
    other = world.submit(request("o", (1,), blend=blend_of(("a", 1.0))))
    world.finish()
    assert isinstance(hit.error, EngineFault)
    assert other.finish == "length"


def test_a_version_that_left_its_slot_fails_its_request_instead_of_answering_wrongly():
    world = World()
    hit = world.submit(request("h", (1,), blend=blend_of(("a", 1.0)), max_tokens=9))
    other = world.submit(request("o", (1,), max_tokens=9))
    step(world)
    world.pool.slots[version("a")] = 7
    world.turn()
    assert isinstance(hit.error, EngineFault)
    world.finish()
    assert other.finish == "length"


def test_abort_between_plan_and_commit_leaves_the_step_without_that_row():
    world = World()
    world.submit(request("a", LONG))
    world.submit(request("b", (1, 2)))
    plan = world.scheduler.plan()
    assert plan is not None
    results = world.device.run(plan)
    world.scheduler.abort("a")
    events = world.scheduler.commit(plan, results)
    assert "a" not in [e.request_id for e in events]
    assert world.blocks.find(plan.rows[0].sequence, 2) == []
    assert not world.scheduler.abort("a")


@pytest.mark.parametrize("at", range(9))
def test_abort_at_every_step_gives_everything_back(at):
    world = World()
    blend = blend_of(("a", 1.0))
    world.submit(request("a", LONG, blend=blend, max_tokens=4))
    for _ in range(at):
        world.turn()
    world.abort("a")
    world.check_end()
    assert world.turn() is False


def test_commit_takes_the_rows_of_a_plan_in_parts():
    world = World(blocks=100)
    for name in "ab":
        world.submit(request(name, (1, 2)))
    plan = world.scheduler.plan()
    assert plan is not None
    parts = [
        Plan(plan.rows[i : i + 1], dataclasses.replace(plan.terms, rows=plan.terms.rows[i : i + 1]))
        for i in range(2)
    ]
    for part in parts:
        events = world.scheduler.commit(part, world.device.run(part))
        assert [e.request_id for e in events] == [part.rows[0].sequence.request.id]


def test_results_must_match_the_rows():
    world = World()
    world.submit(request("a", LONG))
    plan = world.scheduler.plan()
    assert plan is not None
    with pytest.raises(AssertionError, match="one result per row"):
        world.scheduler.commit(plan, [RowResult(), RowResult()])
