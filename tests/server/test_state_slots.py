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
    step(slots, *(row(own, 2, 1) for own in several))
    held = {place for own in several for place in slots._held[own].slots}
    assert len(held) == 6
    assert slots.count == SPARE + 6
    several[1].blocks = []
    late = sequence()
    step(slots, row(late, 0, 1), row(several[0], 3, 1))
    step(slots, row(late, 1, 1))
    assert set(slots._held[late].slots) < held
    assert slots.count == SPARE + 6
    several[1].blocks = [4]  # sent back, and in again
    ((came_from, _),) = step(slots, row(several[1], 0, 2))
    assert came_from == NOBODY
    places = [place for own in slots._held.values() for place in own.slots if place != NOBODY]
    assert len(set(places)) == len(places) == 7


def test_who_begins_anew_forgets_what_it_had():
    slots, own = StateSlots(), sequence()
    step(slots, row(own, 0, 5))
    step(slots, row(own, 5, 1))
    step(slots, row(own, 0, 3))
    with pytest.raises(EngineFault, match="state of this sequence"):
        slots.places([row(own, 5, 1)])


def kept(slots: StateSlots, tokens: int, *, prompt: int = 0) -> Sequence:
    """A sequence of whole blocks of four, the state of each of which it wanted to be kept."""
    own = sequence(prompt or tokens + 1)
    for end in range(4, tokens + 1, 4):
        step(slots, row(own, end - 4, 4))
        own.computed = end
        slots.keep(own, b"%d" % end, end // 4)
    return own


def test_of_a_long_prompt_powers_of_two_and_its_end_last_and_else_the_newest():
    slots = StateSlots()
    slots.most = 64
    kept(slots, 44)
    assert set(slots._kept) == {b"4", b"8", b"16", b"32", b"44"}
    answering = kept(slots, 60, prompt=27)
    assert set(slots._kept) == {b"4", b"8", b"16", b"32", b"44", b"24", b"60"}
    answering.blocks = []
    slots.places([])
    assert slots.kept == 7, "what is kept outlives who computed it"


def test_who_goes_on_from_a_state_leaves_it_as_it_is():
    slots = StateSlots()
    slots.most = 64
    kept(slots, 16)
    assert slots.longest([b"4", b"8", b"x"]) == 2
    assert slots.longest([b"x", b"y"]) == slots.longest([]) == 0
    one, two = sequence(), sequence()
    for own in (one, two):
        slots.resume(own, b"8", 8)
    source, to = slots.places([row(one, 8, 1), row(two, 8, 3)])
    assert source == [slots._kept[b"8"]] * 2
    assert len({*source, *to}) == 3
    slots.computed([row(one, 8, 1), row(two, 8, 3)])
    for start in (9, 10, 11):
        ((came_from, to),) = step(slots, row(one, start, 1))
        assert came_from != source[0]
        assert to != source[0]


def test_the_longest_unused_makes_room_but_nobody_who_runs():
    slots = StateSlots()
    slots.most = SPARE + 5
    kept(slots, 16).blocks = []  # at 4, 8 and 16
    one = sequence()
    slots.resume(one, b"4", 4)
    step(slots, row(one, 4, 1))
    other = sequence()
    step(slots, row(other, 0, 1))
    assert set(slots._kept) == {b"4", b"8", b"16"}
    step(slots, row(other, 1, 1))
    assert set(slots._kept) == {b"4", b"16"}
    slots.forget([b"4", b"nobody's"])
    assert step(slots, row(one, 5, 1))
    third = sequence()
    step(slots, row(third, 0, 1))
    step(slots, row(third, 1, 1))
    assert not slots.kept
    assert slots.count == SPARE + 6, "who runs has two, whatever was meant to be enough"
