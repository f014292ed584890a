"""Requests whose output is guided: the guide moves with what is committed and with nothing else."""

import gc
import weakref
from dataclasses import replace

import pytest

from fader_server.core import PlanRow
from fader_server.engine import following
from fader_server.engine.scheduler import Scheduler
from fader_server.errors import EngineFault
from tests.server.engine.engine_device import Ahead
from tests.server.engine.engine_guides import Turns
from tests.server.engine.engine_world import World, request


def guided(name: str, length: int = 5, prompt: int = 3, **others):
    given = {"max_tokens": 12} | others
    return request(name, range(prompt), guide=Turns(length), **given)


def test_the_end_of_a_guide_is_the_end_of_the_answer():
    world = World()
    world.submit(guided("a", 5))
    world.submit(request("free", range(3), max_tokens=12))
    world.finish()
    assert (world.seen["a"].finish, len(world.seen["a"].tokens)) == ("stop", 5)
    assert (world.seen["free"].finish, len(world.seen["free"].tokens)) == ("length", 12)


def test_max_tokens_in_the_middle_of_it_is_length_and_at_its_end_stop():
    world = World()
    world.submit(guided("cut", 5, max_tokens=4))
    world.submit(guided("just", 5, max_tokens=5))
    world.submit(guided("longer", 5, max_tokens=9, min_tokens=9))
    world.finish()
    assert [s.finish for s in world.seen.values()] == ["length", "stop", "stop"]
    assert [len(s.tokens) for s in world.seen.values()] == [4, 5, 5]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_that_runs_again_in_parts_moves_no_guide(ahead: bool):
    world = World(ahead=ahead)
    for name in "abc":
        world.submit(guided(name, 6))
    world.submit(request("bad", range(3), max_tokens=9))
    world.turn()
    world.turn()
    world.device.culprits.add("bad")
    world.finish()  # Turns notices what is asked for or taken twice, check_end every other token
    assert isinstance(world.seen.pop("bad").error, EngineFault)
    assert [s.finish for s in world.seen.values()] == ["stop"] * 3


def test_who_is_sent_back_goes_on_where_its_guide_is():
    world = World(blocks=9, max_rows=3)
    for name in "abc":
        world.submit(guided(name, 10, prompt=9, max_tokens=14))
    world.finish()
    assert world.scheduler.preemptions > 0
    assert [len(s.tokens) for s in world.seen.values()] == [10] * 3


def test_no_step_begins_ahead_of_a_guides_token():
    world = World(ahead=True)
    world.submit(guided("a", 9))
    world.finish()
    assert isinstance(world.device, Ahead)
    assert world.device.led == 0
    world.submit(request("free", range(3), max_tokens=9))
    world.finish()
    assert world.device.led > 0, "the check cannot fail"


def test_a_step_ahead_of_a_guide_would_be_noticed(monkeypatch, caplog):
    goes_on = following._goes_on

    def blind(row: PlanRow, limits) -> bool:
        free = replace(row.sequence.request, guide=None)
        own, row.sequence.request = row.sequence.request, free
        try:
            return goes_on(row, limits)
        finally:
            row.sequence.request = own

    monkeypatch.setattr(following, "_goes_on", blind)
    world = World(ahead=True)
    world.submit(guided("a", 9))
    world.turn()
    world.turn()
    assert isinstance(world.device, Ahead)
    assert world.device.led == 0
    assert "a guide is behind" in caplog.text


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("kind", ["faulty_mask", "faulty_token"])
@pytest.mark.parametrize("place", [0, 2])
def test_a_guide_that_fails_ends_its_request_and_no_other(kind: str, place: int, ahead: bool):
    world = World(ahead=ahead)
    world.submit(request("bad", range(3), guide=Turns(6, **{kind: place}), max_tokens=9))
    for name in "ab":
        world.submit(guided(name, 6))
    world.submit(request("free", range(3), max_tokens=9))
    runs = 0
    while world.turn():
        runs += 1
    bad = world.seen.pop("bad")
    assert isinstance(bad.error, EngineFault)
    assert (len(bad.tokens), bad.ends) == (place, 1)
    world.check_end()
    assert [s.finish for s in world.seen.values()] == ["stop", "stop", "length"]
    assert world.device.runs == len(world.device.plans), "no step had to run again"


def test_a_guide_that_moves_twice_is_noticed(monkeypatch: pytest.MonkeyPatch):
    commit = Scheduler.commit

    def twice(self, plan, results):
        for row, result in zip(plan.rows, results, strict=True):
            if row.sequence.request.guide is not None and row.samples:
                row.sequence.request.guide.accept(result.token)
        return commit(self, plan, results)

    monkeypatch.setattr(Scheduler, "commit", twice)
    world = World()
    world.submit(guided("a"))
    with pytest.raises(AssertionError, match="twice"):
        world.finish()


@pytest.mark.parametrize("end", ["finish", "abort", "fault"])
def test_nothing_holds_a_guide_when_its_request_has_ended(end: str):
    class Held(Turns):
        pass

    world = World()
    own = Held(5, faulty_mask=2 if end == "fault" else None)
    gone = weakref.ref(own)
    world.submit(request("a", range(3), guide=own, max_tokens=12))
    del own
    world.turn()
    if end == "abort":
        world.abort("a")
    while world.turn():
        pass
    assert gone() is not None, "the test itself holds it until here"
    world.seen.clear()
    world.device.plans.clear()
    gc.collect()
    assert gone() is None
