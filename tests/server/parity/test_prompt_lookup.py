"""Tokens that were guessed and came are those that would have come: tokens, logprobs, ends."""

from dataclasses import replace

import pytest
import torch

from fader_server.core import PlanRow, SamplingParams
from fader_server.engine.limits import Limits
from fader_server.engine.lookup import Lookup
from tests.server.parity.test_families import Setting
from tests.support.world import Answer, Ask, TinyWorld, greedy

LIMITS = Limits(max_rows=16, max_step_tokens=288, max_model_len=512)
BLENDS = ({}, {"r8": 1.0}, {"r8": 0.7, "r16": -0.4}, {"r16": 1.0})


def again(count: int, *, step: int = 1) -> list[int]:
    """A prompt that says the same over and over."""
    return [(11 * i * step) % 490 + 5 for i in range(7)] * count


def asks() -> list[Ask]:
    """Greedy and drawn, penalised, biased, scored, with ends of each kind."""
    cold = SamplingParams(temperature=0.05, seed=3, max_tokens=60, logprobs=2)
    stops = greedy(80, stop_token_ids=frozenset(range(0, 512, 40)), min_tokens=12)
    kinds = [
        greedy(60, logprobs=3),
        cold,
        replace(cold, top_p=0.9, seed=4),
        replace(cold, repetition_penalty=1.05, presence_penalty=0.2, frequency_penalty=0.1),
        greedy(40, repetition_penalty=1.02),
        greedy(50, logit_bias=((17, 0.5), (99, -3.0))),
        stops,
        greedy(30, prompt_logprobs=1),
    ]
    return [
        Ask(again(3 + i, step=i + 1), BLENDS[i % len(BLENDS)], params)
        for i, params in enumerate(kinds)
    ]


def told(answer: Answer) -> tuple[object, ...]:
    assert answer.error is None
    return answer.tokens, answer.logprobs, answer.prompt_logprobs, answer.finish


def apart(setting: Setting, **limits: int) -> tuple[list[bool], TinyWorld]:
    """Of each request alone whether its answer is the same with guesses, and with what world."""
    plain = setting.world(limits=LIMITS)
    guessing = setting.world(limits=replace(LIMITS, lookup=8, **limits))
    same = [told(plain.run([ask])[0]) == told(guessing.run([ask])[0]) for ask in asks()]
    together = zip(plain.run(asks()[:4]), guessing.run(asks()[:4]), strict=True)
    same += [told(ours) == told(theirs) for ours, theirs in together]
    assert len(guessing.plans) < len(plain.plans)
    return same, guessing


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting("llama", tmp_path_factory.mktemp("llama"), torch.float32)


def test_guesses_change_no_answer(llama: Setting):
    same, world = apart(llama)
    assert all(same), same
    lookup = world.scheduler.lookup
    assert 0 < lookup.accepted < lookup.guessed


def test_what_was_foretold_comes_in_fewer_steps(llama: Setting):
    """Of nothing that stands in the prompt, right and wrong, and changes no answer."""
    plain = llama.world(limits=LIMITS)
    guessing = llama.world(limits=replace(LIMITS, lookup=8))
    prompt = [(31 * i * i) % 490 + 5 for i in range(20)]
    params = SamplingParams(temperature=0.9, seed=8, max_tokens=50, logprobs=1)
    (answer,) = plain.run([Ask(prompt, {"r8": 1.0}, params)])
    wrong = [*answer.tokens[:20], 3, 4, *answer.tokens[23:]]
    steps = {}
    for name, prediction in {"none": [], "right": answer.tokens, "edited": wrong}.items():
        before = len(guessing.plans)
        (other,) = guessing.run([Ask(prompt, {"r8": 1.0}, params, prediction=prediction)])
        assert told(other) == told(answer)
        steps[name] = len(guessing.plans) - before
    assert steps["right"] < steps["edited"] < steps["none"] * 0.7


def test_a_guess_that_is_believed_shows(llama: Setting, monkeypatch: pytest.MonkeyPatch):
    def believed(self: Lookup, row: PlanRow) -> bool:
        return True

    monkeypatch.setattr(Lookup, "came", believed)
    plain = llama.world(limits=LIMITS)
    guessing = llama.world(limits=replace(LIMITS, lookup=8))
    same = []
    for ask in asks()[:4]:
        (answer,) = plain.run([ask])
        try:
            (other,) = guessing.run([ask])
        except AssertionError:  # more tokens than were asked for, say
            same.append(False)
        else:
            same.append(told(answer) == told(other))
    assert not all(same)
