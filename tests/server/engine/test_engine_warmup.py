"""Made-up steps at start: of which sizes, for how long, and that nothing is left of them."""

import logging

import pytest

from fader_server.core import Request, RowResult, SamplingParams, Sequence
from fader_server.engine.blocks import NULL_BLOCK, BlockManager
from fader_server.engine.limits import Limits
from fader_server.engine.warmup import warm_up

LIMITS = Limits(max_rows=6, max_step_tokens=96, chunk_size=32, max_model_len=64)
VOCAB = 50
BLOCK = 4


class Recorded:
    """Remembers the plans; fails at one of them."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.plans = []
        self.blocks = []
        """Of every row of every plan, while it ran."""
        self._fails_at = fails_at

    def run(self, plan):
        if len(self.plans) == self._fails_at:
            raise RuntimeError("no such step")
        self.plans.append(plan)
        self.blocks.append([tuple(row.sequence.blocks) for row in plan.rows])
        return [RowResult() for _ in plan.rows]


def free_order(blocks: BlockManager) -> list[int]:
    """Every block, in the order in which they are handed out."""
    sequence = Sequence(Request("r", (1,), SamplingParams()), [1])
    blocks.admit(sequence, [], total=blocks.free, sought=0)
    order = list(sequence.blocks)
    blocks.release(sequence)
    return order


def run(runner, *, count=200, limits=LIMITS, seconds=60.0, **others):
    blocks = BlockManager(count, block_size=BLOCK)
    before = free_order(blocks)
    ran = warm_up(runner, blocks, limits, vocab=VOCAB, seconds=seconds, **others)
    assert free_order(blocks) == before
    assert (blocks.queries, blocks.hits, blocks.cached, blocks.used) == (0, 0, 0, 0)
    return ran


def shapes(plans) -> list[tuple[int, ...]]:
    return [tuple(row.count for row in plan.rows) for plan in plans]


def test_prompts_of_every_number_of_bits_and_decode_steps_of_every_number_of_rows():
    runner = Recorded()
    assert run(runner) == len(runner.plans)
    made = shapes(runner.plans)
    assert made[:4] == [(3,)] * 4
    for prompt in ((5,), (11,), (21,), (32, 11), (32, 32, 21)):
        assert prompt in made
    for rows in range(1, LIMITS.max_rows + 1):
        assert made.count((1,) * rows) == 2
    assert max(map(len, made)) == LIMITS.max_rows
    assert max(map(sum, made)) <= LIMITS.max_step_tokens


@pytest.mark.parametrize("most", [64, 86, 100, 127])
def test_the_largest_steps_have_a_prompt_of_their_number_of_bits(most):
    runner = Recorded()
    limits = Limits(max_rows=6, max_step_tokens=most, chunk_size=32, max_model_len=64)
    run(runner, limits=limits)
    sizes = {sum(shape) for shape in shapes(runner.plans) if max(shape) > 1}
    assert {size.bit_length() for size in sizes} == set(range(2, 8))
    assert max(sizes) == min(most, 85)


def test_small_steps_come_first():
    runner = Recorded()
    run(runner)
    made = shapes(runner.plans)
    assert made.index((11,)) < made.index((1,) * 2) < made.index((21,)) < made.index((1,) * 3)


def test_rows_are_such_as_the_scheduler_makes():
    runner = Recorded()
    run(runner)
    for plan, owned in zip(runner.plans, runner.blocks, strict=True):
        used = [block for own in owned for block in own]
        assert len(set(used)) == len(used), "rows of one step write to blocks of their own"
        assert NULL_BLOCK not in used
        for row, own, terms in zip(plan.rows, owned, plan.terms.rows, strict=True):
            end = row.start + row.count
            assert row.samples == (end == len(row.sequence.tokens))
            assert end <= len(own) * BLOCK
            assert all(0 <= token < VOCAB for token in row.sequence.tokens)
            assert terms.tokens == row.count
            assert not terms.terms


def test_decode_rows_read_what_a_step_before_wrote_at_many_positions():
    runner = Recorded()
    run(runner)
    written = set()
    for plan in runner.plans:
        for row in plan.rows:
            told = {(id(row.sequence), at) for at in range(row.start)}
            assert told <= written
        written |= {
            (id(row.sequence), at)
            for row in plan.rows
            for at in range(row.start, row.start + row.count)
        }
    last = [plan for plan in runner.plans if len(plan.rows) == LIMITS.max_rows][-1]
    assert len({row.start for row in last.rows}) == LIMITS.max_rows


def test_no_step_begins_when_the_time_is_over():
    runner, clock = Recorded(), iter(range(100))
    assert run(runner, seconds=5.0, clock=lambda: float(next(clock))) == 4
    assert len(runner.plans) == 4


@pytest.mark.parametrize("at", [0, 1, 11])
def test_a_step_that_fails_ends_it_aloud(at, caplog):
    runner = Recorded(fails_at=at)
    with caplog.at_level(logging.INFO):
        assert run(runner) == at
    assert "no such step" in caplog.text
    (told,) = [r.fields for r in caplog.records if r.message == "warmed up"]
    assert told["steps"] == at


@pytest.mark.parametrize("count", [2, 3, 9, 20])
def test_a_small_cache_is_never_overdrawn(count):
    runner = Recorded()
    run(runner, count=count)
    assert len(runner.plans) >= 4
    assert all(len(own) < count for owned in runner.blocks for own in owned)


def test_prompts_are_no_longer_than_the_model_takes():
    runner = Recorded()
    limits = Limits(max_rows=6, max_step_tokens=96, chunk_size=32, max_model_len=10)
    run(runner, limits=limits)
    assert max(len(row.sequence.tokens) for plan in runner.plans for row in plan.rows) <= 10
