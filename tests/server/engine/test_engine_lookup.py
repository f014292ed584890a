"""What is guessed, how much of it, and what becomes of it."""

from dataclasses import replace

import pytest

from fader_server.core import Plan, PlanRow, RowResult, Sequence, TokenEvent
from fader_server.engine.blocks import BlockManager
from fader_server.engine.draft import Draft
from fader_server.engine.isolation import run_isolated
from fader_server.engine.limits import Limits
from fader_server.engine.lookup import Lookup
from fader_server.engine.scheduler import Scheduler
from tests.server.engine.engine_guides import Turns
from tests.server.engine.engine_world import FakePool, World, request

LIMITS = Limits(max_rows=8, chunk_size=8, max_step_tokens=64, max_model_len=64, lookup=8)
ROUND = [7, 8, 9, 10, 7, 8, 9]
"""A prompt after which 10, 7, 8, 9 and so on were there before."""


def decoding(tokens: list[int], name: str = "one", **params: object) -> Sequence:
    """A sequence whose newest token is to be computed."""
    one = request(name, tokens[:-1], **{"max_tokens": 40, **params})
    return Sequence(one, list(tokens), computed=len(tokens) - 1, decoding=True)


def lookup(blocks: BlockManager | None = None, **options: int) -> Lookup:
    blocks = blocks or BlockManager(40, block_size=4)
    return Lookup(**{"rows": 8, "blocks": blocks, "max_model_len": 64, **options})


def filled(own: Lookup, *sequences: Sequence) -> list[tuple[int, ...]]:
    """The guesses of a step of these."""
    draft = Draft(LIMITS)
    for sequence in sequences:
        if not sequence.blocks:
            own._blocks.admit(sequence, [], total=len(sequence.tokens) // 4 + 1, sought=0)
        draft.add_token(sequence)
    own.fill(draft)
    rows = draft.rows[len(sequences) :]
    for row in rows:
        assert row.start == row.sequence.computed + len(row.guesses)
        assert (row.count, row.samples, row.tokens) == (1, True, [row.guesses[-1]])
        assert row.unseen == len(row.guesses)
        assert len(row.sequence.blocks) * 4 > row.start
    return [row.guesses for row in rows]


def sure(own: Lookup, sequence: Sequence, rate: float = 0.99) -> None:
    filled(own, sequence)
    own._memories[sequence].rate = rate


def test_what_followed_the_same_tokens_is_guessed_and_goes_round():
    own, sequence = lookup(), decoding(ROUND)
    sure(own, sequence)
    line = (10, 7, 8, 9, 10, 7, 8)
    assert filled(own, sequence) == [line[: n + 1] for n in range(len(line))]


def test_the_last_place_counts():
    own, sequence = lookup(), decoding([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3])
    assert filled(own, sequence)[0] == (5,)


@pytest.mark.parametrize("tokens", [[1, 2], [1, 2, 3], [1, 2, 3, 4, 5, 6], [9, 2, 3, 4, 1, 2, 3]])
def test_nothing_is_guessed_after_what_is_new(tokens: list[int]):
    assert filled(lookup(), decoding(tokens)) == []


def test_new_tokens_are_remembered_as_they_come():
    own, sequence = lookup(), decoding([1, 2, 3, 4, 5])
    assert filled(own, sequence) == []
    for token in (1, 2, 3):
        sequence.tokens.append(token)
        sequence.computed += 1
    assert filled(own, sequence)[0] == (4,)


def test_nobody_is_led_beyond_the_end():
    own = lookup(max_model_len=len(ROUND) + 3)
    short, long = decoding(ROUND, max_tokens=4), decoding(ROUND, "two")
    for sequence in (short, long):
        sure(own, sequence)
        assert len(filled(own, sequence)) == 2
    over = decoding(ROUND, "three", max_tokens=2)
    assert filled(own, over) == []


def test_a_guide_must_know_each_token():
    assert filled(lookup(), decoding(ROUND, guide=Turns(5))) == []


def test_steps_with_prompts_or_many_rows_are_left_as_they_are():
    own, sequence = lookup(), decoding(ROUND)
    prompt = Sequence(request("new", range(8)), list(range(8)))
    draft = Draft(LIMITS)
    own._blocks.admit(sequence, [], total=3, sought=0)
    draft.add_token(sequence)
    draft.add_chunk(prompt)
    own.fill(draft)
    assert len(draft.rows) == 2
    others = [decoding(ROUND, str(n)) for n in range(8)]
    assert filled(lookup(), *others) == []
    assert filled(lookup(rows=0), decoding(ROUND)) == []


def test_more_rows_must_promise_more():
    """A row more costs less than the first one, and the more of them the likelier it must be."""
    counts = []
    for rate in (0.2, 0.5, 0.8, 0.95):
        own, sequence = lookup(), decoding(ROUND)
        sure(own, sequence, rate)
        counts.append(len(filled(own, sequence)))
    assert counts[0] == 0 < counts[1] < counts[2] < counts[3]
    own, crowd = lookup(), [decoding(ROUND, str(n)) for n in range(5)]
    for sequence in crowd:
        sure(own, sequence, 0.6)
    assert filled(own, *crowd) == []


def test_the_likelier_sequence_comes_first():
    own, one, two = lookup(rows=3), decoding(ROUND), decoding(ROUND, "two")
    for sequence, rate in ((one, 0.5), (two, 0.9)):
        sure(own, sequence, rate)
    draft = Draft(LIMITS)
    for sequence in (one, two):
        draft.add_token(sequence)
    own.fill(draft)
    assert [row.sequence for row in draft.rows[2:]] == [two]


def test_no_block_no_guess_and_nobody_loses_one():
    blocks = BlockManager(3, block_size=4)
    own, sequence = lookup(blocks), decoding([*ROUND, 10])
    blocks.admit(sequence, [], total=2, sought=0)
    sure(own, sequence)
    assert filled(own, sequence) == []
    assert len(sequence.blocks) == 2


def taken_in(drawn: list[int]) -> tuple[Lookup, Sequence, list[TokenEvent]]:
    """A step of two guesses, for which a device drew these tokens."""
    blocks = BlockManager(40, block_size=4)
    scheduler = Scheduler(LIMITS, blocks=blocks, pool=FakePool(3))
    sequence = scheduler.add(request("one", ROUND, max_tokens=9, stop_token_ids=frozenset({33})))
    plan = scheduler.plan()
    assert plan is not None
    scheduler.commit(plan, [RowResult(10)])
    plan = scheduler.plan()
    assert plan is not None
    assert [row.guesses for row in plan.rows] == [(), (7,), (7, 8)]
    events = scheduler.commit(plan, [RowResult(token) for token in drawn])
    return scheduler.lookup, sequence, events


@pytest.mark.parametrize(
    ("drawn", "told", "accepted"),
    [
        ([7, 8, 9], [7, 8, 9], 2),
        ([7, 9, 9], [7, 9], 1),
        ([8, 8, 9], [8], 0),
        ([33, 8, 9], [33], 0),
        ([7, 33, 9], [7, 33], 1),
    ],
)
def test_what_follows_a_wrong_guess_or_the_end_is_nothing(drawn, told, accepted):
    own, sequence, events = taken_in(drawn)
    assert [event.token for event in events] == told
    assert sequence.tokens[len(ROUND) + 1 :] == told
    assert own.accepted == accepted
    assert (events[-1].finish == "stop") == (33 in told)
    assert sequence.computed == len(sequence.tokens) - 1


def test_rates_follow_what_comes():
    right, wrong = taken_in([7, 8, 9]), taken_in([8, 8, 9])
    rates = [own._memories[sequence].rate for own, sequence, _ in (right, wrong)]
    assert rates[0] > 0.7 > rates[1]
    own, sequence = lookup(), decoding(ROUND)
    sure(own, sequence, 0.2)
    waited = 0
    while not filled(own, sequence):
        waited += 1
    assert 10 < waited < 100, "it tries again, but not soon"


def test_a_rate_is_no_more_than_what_came():
    """Where steps have too many rows for guesses, for however long."""
    own, crowd = lookup(), [decoding(ROUND, str(n)) for n in range(6)]
    for sequence in crowd:
        sure(own, sequence, 0.75)
    for _ in range(500):
        assert filled(own, *crowd) == []
    assert {own._memories[sequence].rate for sequence in crowd} == {0.75}


def test_a_failed_step_runs_again_without_guesses():
    sequence = decoding(ROUND)
    draft = Draft(LIMITS)
    draft.add_token(sequence)
    draft.add_guess(sequence, (10,))
    plan, ran = draft.plan(), []

    class Broken:
        def run(self, given: Plan) -> list[RowResult]:
            ran.append(given)
            if any(row.guesses for row in given.rows):
                raise RuntimeError("injected")
            return [RowResult(3)]

    assert plan is not None
    outcome = run_isolated(Broken(), plan)
    assert [[row.guesses for row in one.rows] for one in ran] == [[(), (10,)], [()]]
    assert not outcome.failed
    assert not outcome.crowded
    assert [results for _, results in outcome.done] == [[RowResult(3)]]


def test_tokens_come_in_fewer_steps():
    """And are the same, also behind a device that computes by itself."""
    steps = []
    for rows in (0, 4):
        for ahead in (False, True):
            world = World(lookup=rows, ahead=ahead, max_model_len=64)
            seen = world.submit(request("one", [0, 1, 2, 3] * 4, max_tokens=40, seed=100))
            world.finish()
            assert len(seen.tokens) == 40
            steps.append(len(world.device.plans))
    assert max(steps[2:]) < min(steps[:2])


def test_a_row_of_a_guess_is_not_of_its_sequence():
    row = PlanRow(decoding(ROUND), len(ROUND), 1, True, (10,))
    assert row.tokens == [10]
    assert replace(row, guesses=()).tokens == []
