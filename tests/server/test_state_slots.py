"""Slots of states: where a sequence goes on from and leaves its next state, whatever runs again."""

import pytest

from fader_server.core import PlanRow, Request, SamplingParams, Sequence
from fader_server.errors import EngineFault
from fader_server.model.state_slots import NOBODY, SPARE, StateSlots


def sequence(tokens: int = 20) -> Sequence:
    ids = list(range(tokens))
    return Sequence(Request("r", tuple(ids), SamplingParams()), ids, blocks=[1])


def row(own: Sequence, start: int, count: int) -> PlanRow:
    return PlanRow(own, start, count, samples=False)


def step(slots: StateSlots, *rows: PlanRow) -> list[tuple[int, int]]:
    places = list(zip(*slots.places(rows), strict=True))
    slots.computed(rows)
    return places


def test_a_sequence_goes_on_from_where_it_left_off_and_never_writes_what_it_reads():
    slots, own = StateSlots(), sequence()
    ((nobody, first),) = step(slots, row(own, 0, 5))
    assert nobody == NOBODY
    seen = first
    for start in (5, 6, 7):
        ((came_from, to),) = step(slots, row(own, start, 1))
        assert came_from == seen
        assert to != came_from
        seen = to
    assert min(first, seen) >= SPARE


def test_a_step_may_be_run_again_and_a_smaller_one_in_its_place():
    slots, own, other = StateSlots(), sequence(), sequence()
    step(slots, row(own, 0, 5), row(other, 0, 3))
    both = step(slots, row(own, 5, 4), row(other, 3, 1))
    assert step(slots, row(own, 5, 4), row(other, 3, 1)) == both
    assert step(slots, row(own, 5, 2)) == both[:1]
    ((came_from, _),) = step(slots, row(own, 7, 1))
    assert came_from == both[0][1]
    with pytest.raises(EngineFault, match="state of this sequence"):
        slots.places([row(own, 9, 1)])


def test_what_was_asked_but_not_computed_is_not_there():
    slots, own = StateSlots(), sequence()
    step(slots, row(own, 0, 5))
    slots.places([row(own, 5, 1)])
    with pytest.raises(EngineFault, match="state of this sequence"):
        slots.places([row(own, 6, 1)])
    assert step(slots, row(own, 5, 1))


def test_slots_are_nobody_elses_and_return_when_a_sequence_ends_or_is_sent_back():
    slots = StateSlots()
    several = [sequence() for _ in range(3)]
    step(slots, *(row(own, 0, 2) for own in several))
    held = {place for own in several for place in slots._held[own].slots}
    assert len(held) == 6
    assert slots.count == SPARE + 6
    several[1].blocks = []
    late = sequence()
    step(slots, row(late, 0, 1), row(several[0], 2, 1))
    assert set(slots._held[late].slots) < held
    assert slots.count == SPARE + 6
    several[1].blocks = [4]  # sent back, and in again
    ((came_from, _),) = step(slots, row(several[1], 0, 2))
    assert came_from == NOBODY
    assert len({place for own in slots._held.values() for place in own.slots}) == 8


def test_who_begins_anew_forgets_what_it_had():
    slots, own = StateSlots(), sequence()
    step(slots, row(own, 0, 5))
    step(slots, row(own, 5, 1))
    step(slots, row(own, 0, 3))
    with pytest.raises(EngineFault, match="state of this sequence"):
        slots.places([row(own, 5, 1)])
