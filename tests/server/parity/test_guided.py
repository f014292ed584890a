"""Answers under a JSON Schema from random models: they conform, and nobody beside them notices."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from fader_server.core import SamplingParams
from fader_server.engine.limits import Limits
from fader_server.text.grammar import Grammar, grammar_of
from fader_server.text.shape import Shape
from fader_server.text.vocabulary import Vocabulary, read_vocabulary
from tests.server.parity.test_families import BOUND, Setting, prompts
from tests.server.test_text_guides import PERSON, conforms
from tests.support.lanes import merge, publish
from tests.support.many_families import write_many
from tests.support.solo_families import SOLO
from tests.support.world import Answer, Ask, TinyWorld

FP32 = BOUND[torch.float32]
EOS = 2
SIZE = 300
"""The model's head has more."""


class Bytes:
    """Token 3 is byte 0."""

    def is_silent(self, token: int) -> bool:
        return not 3 <= token < 259

    def piece(self, token: int) -> bytes:
        return bytes([token - 3])


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return read_vocabulary(Bytes(), SIZE, [EOS])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def grammar(vocabulary: Vocabulary) -> Grammar:
    return Grammar(grammar_of(Shape("schema", json.dumps(PERSON))), vocabulary)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting("llama", tmp_path_factory.mktemp("llama"), torch.float32)


BLENDS = ({}, {"r8": 1.0}, {"r64": -0.5}, {"r8": 0.7, "r16": 0.4}, {"r16": 1.0}, {})


def params(seed: int, **others) -> SamplingParams:
    given = {"temperature": 1.0, "max_tokens": 220, "logprobs": 0, "stop_token_ids": {EOS}}
    given["stop_token_ids"] = frozenset(given["stop_token_ids"])
    return SamplingParams(seed=seed, **(given | others))


def asks(grammar: Grammar | None, *, count: int = 6, **others) -> list[Ask]:
    given = prompts(count)
    return [
        Ask(
            given[i], BLENDS[i % 6], params(i, **others),
            None if grammar is None else grammar.guide(),
        )
        for i in range(count)
    ]  # fmt: skip


def text(answer: Answer) -> str:
    return bytes(t - 3 for t in answer.tokens if t != EOS).decode()


def well(answer: Answer) -> bool:
    try:
        return conforms(json.loads(text(answer)))
    except ValueError:
        return False


def raw(answer: Answer) -> tuple:
    return answer.tokens, answer.logprobs, answer.finish


def test_every_answer_conforms_whatever_makes_it_and_free_ones_do_not(llama, grammar):
    world = llama.world()
    answers = world.run(asks(grammar))
    assert [a.finish for a in answers] == ["stop"] * 6
    assert all(map(well, answers))
    free = world.run([replace(a, params=replace(a.params, max_tokens=40)) for a in asks(None)])
    assert not any(max(a.tokens) < 259 and well(a) for a in free)


def test_a_merged_lane_is_guided_too(llama, grammar):
    world = llama.world()
    publish(world, merge(world, {"r16": 1.0}, form="dense"))
    answers = world.run(asks(grammar))
    assert any(row.lane for plan in world.plans for row in plan.rows)
    assert all(map(well, answers))


def test_free_rows_keep_their_bits_beside_guided_ones(llama, grammar):
    free = asks(None, max_tokens=30)
    alone = [raw(a) for a in llama.world().run(free)]
    mixed = [ask for pair in zip(free, asks(grammar), strict=True) for ask in pair]
    answers = llama.world().run(mixed)
    assert [raw(a) for a in answers[::2]] == alone
    assert [raw(a) for a in answers[1::2]] != alone, "the check cannot fail"
    assert all(map(well, answers[1::2]))


def test_company_chunks_and_being_sent_back_change_no_guided_answer(llama, grammar):
    alone = [raw(llama.world().run([ask])[0]) for ask in asks(grammar)]
    small = Limits(max_rows=16, max_step_tokens=48, chunk_size=16, max_model_len=512)
    assert [raw(a) for a in llama.world(limits=small).run(asks(grammar))] == alone
    crowded = llama.world(blocks=24)
    assert [raw(a) for a in crowded.run(asks(grammar))] == alone
    assert crowded.scheduler.preemptions > 0


def test_logprobs_are_those_of_the_model(llama, grammar):
    given = asks(grammar, count=3)
    for ask, answer in zip(given, llama.world().run(given), strict=True):
        logits = llama.oracle.logits([*ask.prompt, *answer.tokens][:-1], ask.blend)
        scores = torch.log_softmax(logits, dim=-1)[len(ask.prompt) - 1 :]
        told = torch.tensor([item.logprob for item in answer.logprobs])
        expected = scores[torch.arange(len(told)), answer.tokens]
        torch.testing.assert_close(told, expected, rtol=0, atol=FP32)
        # the model would rather have said something else
        assert (scores.argmax(-1) != torch.tensor(answer.tokens)).float().mean() > 0.5


def test_too_few_tokens_end_in_the_middle(llama, grammar):
    (answer,) = llama.world().run(asks(grammar, count=1, max_tokens=7))
    assert answer.finish == "length"
    assert not well(answer)
    assert text(answer).startswith("{")


def test_a_step_that_fails_and_runs_in_parts_leaves_guides_where_they_are(llama, grammar):
    """Plans of rows that were not committed are run again, twice."""
    alone = [raw(a) for a in llama.world().run(asks(grammar))]
    world = llama.world()
    run = world.runner.run

    def thrice(plan):
        run(plan)
        run(plan)
        return run(plan)

    world.runner.run = thrice
    assert [raw(a) for a in world.run(asks(grammar))] == alone


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bloom", "qwen3.5"])
def test_bases_whose_sequences_run_alone_are_guided(family: str, grammar, tmp_path: Path):
    make = partial(TinyWorld, write_many(*SOLO[family], tmp_path / "base"))
    given = [replace(ask, blend={}) for ask in asks(grammar, count=4)]
    answers = make().run(given)
    ended = [a for a in answers if a.finish == "stop"]  # a draw may begin a text without an end
    assert len(ended) > 1
    assert all(map(well, ended))
    given = [replace(ask, blend={}) for ask in asks(grammar, count=4)]
    assert [raw(make().run([ask])[0]) for ask in given] == [raw(a) for a in answers]
