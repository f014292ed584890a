"""Prefixes of bases whose layers keep states: who goes on from another's has its own bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fader_server.model.packed_states import KEPT
from fader_server.model.state_slots import SPARE, StateSlots
from tests.server.parity.test_packed_states import FAMILIES, KEYED, STATEFUL
from tests.support.own_states import LIMITS, Setting, bits
from tests.support.world import Ask, TinyWorld, greedy

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = 16
BLENDS: tuple[dict[str, float], ...] = ({}, {"r8": 1.0}, {"r8": 0.5, "r16": -0.4})


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting.of(STATEFUL, tmp_path_factory.mktemp(STATEFUL))


def text(seed: int, tokens: int, vocab: int = 500) -> tuple[int, ...]:
    made = torch.randint(3, vocab, (tokens,), generator=torch.Generator().manual_seed(seed))
    return tuple(made.tolist())


def fresh(setting: Setting, asks: list[Ask], **options: object) -> list:
    """Their bits where nothing can be found."""
    world = setting.world(limits=LIMITS, **options)
    world.blocks.findable = False
    answers = [world.run([ask])[0] for ask in asks]
    assert not any(answer.cached for answer in answers)
    return bits(answers)


def turns(blend: dict[str, float], world: TinyWorld, seed: int) -> tuple[list[Ask], list]:
    """A conversation of three turns, each with all that was said before; its answers."""
    asks, answers, said = [], [], text(seed, 150)
    for turn in range(3):
        ask = Ask(said, blend, greedy(21))
        (answer,) = world.run([ask])
        asks.append(ask)
        answers.append(answer)
        said = (*said, *answer.tokens, *text(seed + turn, 9))
    return asks, answers


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(*f.values, marks=pytest.mark.slow) for f in KEYED)]
)
def test_a_conversation_goes_on_from_where_it_was(family: str, tmp_path: Path):
    setting = Setting.of(family, tmp_path)
    world = setting.world(limits=LIMITS)
    for blend in BLENDS[1:]:
        asks, answers = turns(blend, world, seed=1)
        for before, ask, answer in zip(answers, asks[1:], answers[1:], strict=False):
            whole = len(ask.prompt) - 9 - 1  # the last token of an answer is not computed
            assert answer.cached == whole // BLOCK * BLOCK, before
        assert bits(answers) == fresh(setting, asks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [129, 144, 150, 257, 270, 400])
def test_a_prompt_that_comes_again_is_computed_from_its_last_whole_block(
    setting: Setting, length: int, dtype: torch.dtype
):
    world, ask = setting.world(limits=LIMITS, dtype=dtype), Ask(text(3, length), {}, greedy(4))
    first, again = world.run([ask])[0], world.run([ask])[0]
    assert bits([first]) == bits([again]) == fresh(setting, [ask], dtype=dtype)
    rest = length - again.cached
    chunk = LIMITS.chunk_size
    assert 0 < rest <= (BLOCK if (length - 1) % chunk >= 128 else (length - 1) % chunk + 1)


def test_what_others_have_in_common_is_found_at_the_ends_of_chunks(setting: Setting):
    """At those that are powers of two: few, however long a prompt is."""
    world, shared = setting.world(limits=LIMITS), text(5, 300)
    asks = [Ask((*shared, *text(seed, 80)), {}, greedy(5)) for seed in range(4)]
    answers = [world.run([ask])[0] for ask in asks]
    assert [answer.cached for answer in answers] == [0, 256, 256, 256]
    assert bits(answers) == fresh(setting, asks)
    states = world.base.packed_states
    assert states is not None
    assert states.slots.kept == len((32, 64, 128, 256)) + len(asks)


def test_nothing_is_found_under_another_blend_or_weight(setting: Setting):
    world, said = (
        setting.world(limits=replace(LIMITS, max_rows=24, max_step_tokens=56)),
        text(7, 200),
    )
    asks = [Ask(said, blend, greedy(6)) for blend in (*BLENDS, {"r8": 0.9999})]
    answers = [world.run([ask])[0] for ask in asks]
    assert [answer.cached for answer in answers] == [0] * len(asks)
    again = [world.run([ask])[0] for ask in asks]
    assert all(answer.cached for answer in again)
    assert bits(again) == bits(answers) == fresh(setting, asks)


def test_few_slots_keep_the_newest_and_no_bit_changes(setting: Setting):
    limits = replace(LIMITS, max_rows=2)
    world = setting.world(limits=limits)
    asks = [Ask(text(seed, 140 + 16 * seed), BLENDS[seed % 3], greedy(20)) for seed in range(9)]
    first, again = world.run(asks), world.run(asks[::-1])[::-1]
    states = world.base.packed_states
    assert states is not None
    assert states.slots.count <= states.slots.most == SPARE + 2 * limits.max_rows + KEPT
    assert KEPT - 2 <= states.slots.kept <= states.slots.most - SPARE
    assert 0 < sum(answer.cached > 0 for answer in again) < len(asks)
    assert bits(first) == bits(again) == fresh(setting, asks)


def test_in_company_going_on_from_one_state_changes_no_bit(setting: Setting):
    world, shared = setting.world(limits=LIMITS), text(9, 257)
    world.run([Ask(shared, {}, greedy(3))])
    asks = [Ask((*shared, *text(seed, 1 + seed)), {}, greedy(18)) for seed in range(5)]
    answers = world.run(asks)
    assert all(answer.cached for answer in answers)
    assert bits(answers) == fresh(setting, asks)


def test_another_state_would_show(setting: Setting, monkeypatch: pytest.MonkeyPatch):
    world, said = setting.world(limits=LIMITS), text(3, 270)
    ask = Ask(said, {}, greedy(8))
    expected = bits(world.run([ask]))
    resume = StateSlots.resume

    def another(self: StateSlots, sequence: object, key: bytes, tokens: int) -> None:
        other = next(known for known in self._kept if known != key)
        resume(self, sequence, other, tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(StateSlots, "resume", another)
    again = world.run([ask])
    assert again[0].cached
    assert bits(again) != expected


def test_what_is_not_finite_is_not_found_again(setting: Setting, monkeypatch: pytest.MonkeyPatch):
    world, ask = setting.world(limits=LIMITS), Ask(text(3, 270), {}, greedy(8))
    expected = bits(world.run([ask]))
    states = world.base.packed_states
    assert states is not None
    assert states.slots.kept
    commit = world.scheduler.commit
    monkeypatch.setattr(
        world.scheduler,
        "commit",
        lambda plan, results: commit(plan, [replace(one, finite=False) for one in results]),
    )
    hits = world.blocks.hits
    (broken,) = world.run([ask])
    assert broken.error is not None
    assert world.blocks.hits > hits
    monkeypatch.undo()
    (again,) = world.run([ask])
    assert again.cached == 0
    assert bits([again]) == expected
