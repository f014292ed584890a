"""Rows whose tokens a guide allows: masked before the draw, scored as the model says, apart."""

import math
import random
from dataclasses import dataclass, replace

import pytest
import torch

from fader_server.core import PlanRow, Request, SamplingParams, Sequence
from fader_server.errors import EngineFault
from fader_server.model.sampler import Sampler
from tests.server.test_sampler import GREEDY, V, noise, random_sequence
from tests.support.samplers import distributions  # noqa: F401


@dataclass
class Only:
    """Allows these; one bit for each of `known` ids."""

    allows: frozenset[int]
    known: int = V
    fault: bool = False
    ended: bool = False

    def allowed(self) -> bytes:
        if self.fault:
            raise EngineFault("injected")
        bits = sum(1 << token for token in self.allows)
        return bits.to_bytes(-(-self.known // 8), "little")

    def accept(self, token: int) -> None:
        raise AssertionError("the sampler moves no guide")


def seq(*allows: int, params: SamplingParams = GREEDY, output=(), **others) -> Sequence:
    guide = Only(frozenset(allows), **others)
    return Sequence(Request("r", (1, 2, 3), params, guide=guide), [1, 2, 3, *output])


def one(logits: torch.Tensor, sequence: Sequence):
    return Sampler().sample(logits[None], [sequence])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_what_is_allowed_is_drawn(dtype, temperature):
    logits, found = noise(40, seed=1).to(dtype), set()
    kept = logits.clone()
    for index, row in enumerate(logits):
        params = SamplingParams(temperature=temperature, seed=index)
        found.add(one(row, seq(0, 7, 8, 200, V - 1, params=params)).token)
    assert torch.equal(logits, kept)
    assert found <= {0, 7, 8, 200, V - 1}
    assert len(found) > 2
    free = {one(row, Sequence(Request("r", (1,), GREEDY), [1])).token for row in logits}
    assert not free <= {0, 7, 8, 200, V - 1}, "the check cannot fail"


def test_ids_beyond_the_tokenizers_are_forbidden():
    logits = torch.zeros(V)
    logits[100:] = 9.0
    assert one(logits, seq(3, 5, known=8)).token == 3


def test_a_tokenizer_wider_than_the_head_is_cut():
    assert one(noise(1)[0], seq(3, 300, 999, known=1000)).token == 3


def test_bias_and_truncation_act_on_what_is_allowed():
    logits = torch.zeros(V)
    logits[50] = 30.0
    params = SamplingParams(temperature=0.0, logit_bias=((8, 2.0), (50, 100.0), (9, 100.0)))
    assert one(logits, seq(7, 8, params=params)).token == 8
    params = SamplingParams(temperature=1.0, top_k=1, seed=4)
    assert one(logits, seq(7, 8, params=params)).token in (7, 8)
    params = replace(params, top_k=0, top_p=0.01, repetition_penalty=1.5)
    assert one(logits, seq(7, 8, params=params)).token in (7, 8)


def test_logprobs_are_the_models_and_not_of_the_allowed():
    logits = noise(1)[0]
    params = replace(GREEDY, logprobs=3)
    guided, free = one(logits, seq(7, 8, params=params)), torch.log_softmax(logits.double(), -1)
    assert guided.logprob is not None
    assert guided.logprob.logprob == pytest.approx(free[guided.token].item(), abs=1e-5)
    assert guided.logprob.top[0][0] == int(logits.argmax()) != guided.token


def test_min_tokens_forbids_stop_tokens_unless_nothing_else_is_left():
    logits = torch.zeros(V)
    logits[4] = 9.0
    params = SamplingParams(temperature=0.0, min_tokens=3, stop_token_ids=frozenset({4, 6, 999}))
    assert one(logits, seq(4, 5, 6, params=params)).token == 5
    assert one(logits, seq(4, 6, params=params)).token == 4
    assert one(logits, seq(4, 5, 6, params=params, output=[9, 9, 9])).token == 4


def test_rows_without_a_guide_keep_their_bits_beside_guided_ones():
    rng = random.Random(5)
    logits = noise(24, seed=2)
    rows = [random_sequence(rng) for _ in range(24)]
    alone = [Sampler().sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    mixed = list(rows)
    for index in range(0, 24, 3):
        own = replace(rows[index].request, guide=Only(frozenset({3, 4, 5})))
        mixed[index] = Sequence(own, rows[index].tokens)
    found = Sampler().sample(logits, mixed)
    assert [r for i, r in enumerate(found) if i % 3] == [r for i, r in enumerate(alone) if i % 3]
    assert [r for i, r in enumerate(found) if not i % 3] != alone[::3], "the check cannot fail"
    assert all(r.token in (3, 4, 5) for r in found[::3])


def test_a_guided_row_has_the_bits_it_has_alone():
    logits = noise(9, seed=3)
    params = [SamplingParams(temperature=1.0, seed=i, logprobs=2) for i in range(9)]
    rows = [seq(*range(i, 200, 3), params=p) for i, p in enumerate(params)]
    alone = [one(logits[i], row) for i, row in enumerate(rows)]
    assert Sampler().sample(logits, rows) == alone


def test_a_guide_that_fails_costs_its_row_only():
    logits = noise(3)
    rows = [seq(5), seq(5, fault=True), Sequence(Request("r", (1,), GREEDY), [1])]
    found = Sampler().sample(logits, rows)
    assert found[0].token == 5
    assert isinstance(found[1].fault, EngineFault)
    assert found[1].token is None
    assert found[2] == one(logits[2], rows[2])
    assert found[2].fault is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_told_so_under_a_guide_too(bad):
    logits = noise(2)
    logits[0, 9] = bad
    found = Sampler().sample(logits, [seq(5, 9), seq(5)])
    assert [r.finite for r in found] == [False, True]
    logits[0, 9], logits[0, 11] = 0.0, bad
    assert [r.finite for r in Sampler().sample(logits, [seq(5, 9), seq(5)])] == [False, True]


def test_a_step_without_guides_asks_for_no_mask(monkeypatch):
    def never(*_):
        raise AssertionError("work for nobody")

    monkeypatch.setattr("fader_server.model.sampler._forbid", never)
    Sampler().sample(noise(2), [random_sequence(random.Random(i)) for i in range(2)])
    with pytest.raises(AssertionError):
        one(noise(1)[0], seq(5))


def test_no_guided_row_is_drawn_ahead_of_its_tokens():
    with pytest.raises(AssertionError):
        Sampler().launch(noise(1), [PlanRow(seq(5), 3, 1, samples=True)])
