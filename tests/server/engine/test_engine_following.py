"""Steps that begin before the tokens of the step in front are known: same answers, nothing lost."""

import threading
import time

import pytest

from fader_server.core import Lane, Plan, TokenEvent
from fader_server.engine.blocks import BlockManager
from fader_server.engine.limits import Limits
from fader_server.engine.loop import Engine
from fader_server.engine.scheduler import Scheduler
from fader_server.errors import EngineFault, NumericFault
from tests.server.engine.engine_device import Ahead, UnderWay
from tests.server.engine.engine_world import (
    FakePool,
    World,
    blend_of,
    check_answer,
    expected,
    request,
    version,
)


def world(**options: int) -> World:
    return World(ahead=True, **options)


def led(of: World) -> int:
    assert isinstance(of.device, Ahead)
    return of.device.led


def decoding(of: World, *names: str, **params: object) -> None:
    """Submit requests and turn until a step has begun ahead."""
    for name in names:
        of.submit(request(name, range(3), **params))
    while not of.stepper.under_way:
        of.turn()


def test_decode_steps_begin_ahead_up_to_the_last_and_give_the_same_tokens() -> None:
    own = world()
    decoding(own, "a", "b", max_tokens=8, blend=blend_of(("x", 0.5)))
    own.finish()
    assert led(own) == 6, "seven decode steps, the first begins in its turn"


def test_what_a_row_computes_past_its_stop_token_is_thrown_away() -> None:
    own = world()
    long = expected(request("a", range(3), max_tokens=9))
    stop = next(t for i, t in enumerate(long) if i >= 3 and t not in long[:i])
    own.submit(request("a", range(3), max_tokens=9, stop_token_ids=frozenset({stop})))
    own.submit(request("b", range(4), max_tokens=9))
    own.finish()
    assert own.seen["a"].finish == "stop"
    assert own.seen["a"].tokens == long[: long.index(stop) + 1]
    assert led(own) > 3


def test_blocks_of_a_row_that_ended_may_be_anybodys_at_once() -> None:
    """The step that is under way still writes there; whoever comes next writes after it."""
    own = world(blocks=7, max_rows=2)
    stops = frozenset(range(0, 50, 2))
    for i in range(12):
        own.submit(request(f"r{i}", range(i, i + 5), max_tokens=7, stop_token_ids=stops))
    own.finish()
    assert led(own) > 3
    assert {seen.finish for seen in own.seen.values()} >= {"stop"}


def test_a_wrong_token_would_show() -> None:
    """The control of all of this: a step that goes on by another token than was drawn."""
    own = world()
    decoding(own, "a", max_tokens=8)
    assert own.stepper._flight is not None
    step = own.stepper._flight.launched
    assert isinstance(step, UnderWay)
    step.before = None
    step.plan.rows[0].sequence.tokens.append(49)
    with pytest.raises(AssertionError):
        own.finish()


def planned(of: World) -> Plan:
    """The next step, not run."""
    plan = of.scheduler.plan()
    assert plan is not None
    return plan


def prompted(*, tokens: int = 6, **options: int) -> World:
    """A row that stands behind its prompt, on a device that computes on the caller's thread."""
    own = World(**options)
    own.submit(request("a", range(3), max_tokens=tokens))
    own.turn()
    return own


def test_the_step_after_one_of_decode_rows_is_each_of_them_one_token_on() -> None:
    own = prompted()
    plan = planned(own)
    after = own.scheduler.ahead(plan)
    assert after is not None
    assert [(r.sequence, r.start, r.count, r.samples) for r in after.rows] == [
        (r.sequence, r.start + 1, 1, True) for r in plan.rows
    ]
    assert after.terms is plan.terms


def test_none_is_known_beside_a_prompt() -> None:
    own = prompted()
    own.submit(request("b", range(20)))
    assert own.scheduler.ahead(planned(own)) is None


def test_none_is_known_when_a_row_ends_by_its_length() -> None:
    assert (own := prompted(tokens=2)).scheduler.ahead(planned(own)) is None
    assert (own := prompted(tokens=3)).scheduler.ahead(planned(own)) is not None
    short = prompted(tokens=4, max_model_len=7)
    short.scheduler.limits = Limits(max_rows=4, max_step_tokens=12, chunk_size=8, max_model_len=5)
    assert short.scheduler.ahead(planned(short)) is None


def test_none_is_known_without_a_block_to_go_on_in() -> None:
    own = prompted()
    plan = planned(own)
    taken = [own.blocks._free.pop() for _ in range(own.blocks.free)]
    assert own.scheduler.ahead(plan) is None
    own.blocks._free += taken
    after = own.scheduler.ahead(plan)
    assert after is not None
    assert len(after.rows[0].sequence.blocks) == 2, "position 4 is the second block's"


def test_none_is_known_when_somebody_may_be_admitted_and_one_is_in_a_full_house() -> None:
    for rows, known in ((2, False), (1, True)):
        own = prompted(max_rows=rows)
        plan = planned(own)
        own.submit(request("b", range(3)))
        assert (own.scheduler.ahead(plan) is not None) == known


def test_none_is_known_when_an_adapter_is_not_where_it_was() -> None:
    own = World()
    own.submit(request("a", range(3), blend=blend_of(("x", 1.0))))
    own.turn()
    plan = planned(own)
    assert own.scheduler.ahead(plan) is not None
    own.pool.slots = {version: slot + 1 for version, slot in own.pool.slots.items()}
    assert own.scheduler.ahead(plan) is None


def test_a_row_of_a_merged_lane_goes_on_like_any_other() -> None:
    """Its adapters are in the lane's weights: nothing of it can be out of place."""
    own = World()
    blend = blend_of(("x", 1.0))
    own.scheduler.lanes.replace(Lane(blend.digest, version("lane")))
    own.submit(request("a", range(3), blend=blend))
    own.submit(request("b", range(3), blend=blend_of(("y", 1.0))))
    own.turn()
    plan = planned(own)
    assert [row.lane is not None for row in plan.rows] == [True, False]
    after = own.scheduler.ahead(plan)
    assert after is not None
    assert [row.lane for row in after.rows] == [row.lane for row in plan.rows]


def test_none_begins_when_somebody_asks_for_something_else() -> None:
    own = world()
    own.submit(request("a", range(3), max_tokens=6))
    while own.stepper.turn(onward=lambda: False):
        assert not own.stepper.under_way
    own.check_end()
    assert led(own) == 0


def test_a_full_house_goes_ahead_though_others_wait() -> None:
    own = world(max_rows=2)
    decoding(own, "a", "b", max_tokens=8)
    own.submit(request("c", range(3)))
    before = led(own)
    own.turn()
    assert led(own) == before + 1
    own.finish()


def test_a_step_that_fails_takes_the_one_behind_it_along() -> None:
    own = world()
    decoding(own, "a", "b", "c", max_tokens=9)
    own.device.culprits.add("b")
    own.finish()
    assert isinstance(own.seen["b"].error, EngineFault)
    for name in "ac":
        check_answer(name, own.seen[name])
        assert own.seen[name].finish == "length"


def test_a_row_that_is_not_finite_leaves_the_others_their_step() -> None:
    own = world()
    decoding(own, "a", "b", max_tokens=9)
    own.device.nan.add("a")
    own.finish()
    assert isinstance(own.seen["a"].error, NumericFault)
    assert own.seen["b"].finish == "length"


def test_a_step_that_cannot_begin_ahead_comes_in_its_turn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = world()
    decoding(own, "a", max_tokens=6)

    def fail(step: object, plan: Plan) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr("tests.server.engine.engine_device.UnderWay.ahead", fail)
    own.finish()
    assert own.seen["a"].finish == "length"
    assert "ahead of its turn" in caplog.text


def test_an_abort_between_a_step_and_the_one_behind_it_ends_the_row_for_both() -> None:
    own = world()
    decoding(own, "a", "b", max_tokens=9)
    own.abort("a")
    own.check()
    own.finish()
    assert own.seen["b"].finish == "length"
    alone = world()
    decoding(alone, "a", max_tokens=9)
    alone.abort("a")
    assert not alone.turn(), "nobody is left to wait for"
    assert not alone.stepper.under_way


def test_what_others_ask_for_meets_no_step_under_way() -> None:
    """On the engine's own thread: a command runs between two steps, and soon."""
    limits = Limits(max_rows=4, chunk_size=8, max_step_tokens=12, max_model_len=4000)
    device = Ahead(1200, 4)
    scheduler = Scheduler(limits, blocks=BlockManager(1200, block_size=4), pool=FakePool(3))
    engine = Engine(scheduler, device, device.upload)
    ended, tokens = threading.Event(), 0

    def sink(event: TokenEvent) -> None:
        nonlocal tokens
        tokens += 1
        if event.finish or event.error:
            ended.set()

    with engine:
        engine.submit(request("a", range(3), max_tokens=3000), sink)
        while tokens < 20:
            time.sleep(0.001)
        for _ in range(50):
            assert engine.call(lambda: engine._stepper.under_way).result(timeout=10) is False
        assert device.led > 10
        engine.abort("a")
        engine.call(lambda: None).result(timeout=10)
        assert not scheduler.running
        assert not ended.is_set()
