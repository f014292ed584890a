"""Sampler: greedy choice, edits, faults, logprobs and independence of rows."""

import math
import random
from dataclasses import replace

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from fader_server.core import PlanRow, Request, SamplingParams, Sequence
from fader_server.model.sampler import Sampler
from tests.support.samplers import distributions  # noqa: F401

V = 257
GREEDY = SamplingParams(temperature=0.0)


def seq(params=GREEDY, *, prompt=(1, 2, 3), output=()):
    return Sequence(Request("r", tuple(prompt), params), [*prompt, *output])


def one(logits, sequence):
    return Sampler().sample(logits[None], [sequence])[0]


def noise(rows, vocab=V, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 4


def random_sequence(rng, vocab=V):
    pick = rng.choice
    params = SamplingParams(
        temperature=pick([0.0, 0.0, 0.3, 1.0, 1.7]),
        top_k=pick([0, 0, 1, 7, 100]),
        top_p=pick([1.0, 1.0, 0.9, 0.3]),
        min_p=pick([0.0, 0.0, 0.1]),
        repetition_penalty=pick([1.0, 1.0, 1.3]),
        presence_penalty=pick([0.0, 0.0, 0.7]),
        frequency_penalty=pick([0.0, 0.0, -0.4]),
        logit_bias=pick([(), ((5, 3.0), (9, -100.0))]),
        seed=rng.randrange(-(2**63), 2**63),
        logprobs=pick([None, 0, 3, 20]),
        min_tokens=pick([0, 8]),
        stop_token_ids=frozenset({0, 4}),
    )
    draw = [rng.randrange(vocab) for _ in range(20)]
    return seq(params, prompt=draw[:9], output=draw[9 : 9 + rng.randrange(11)])


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.zeros(V)
    logits[[40, 7, 200]] = 5.0
    assert one(logits, seq()).token == 7
    logits[40] = 5.5
    assert one(logits, seq()).token == 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_matches_argmax_and_leaves_the_logits_alone(dtype):
    logits = noise(6).to(dtype)
    before = logits.clone()
    edited = replace(GREEDY, logit_bias=((3, 9.0),), logprobs=2)
    results = Sampler().sample(logits, [seq(), seq(), seq(edited), seq(), seq(edited), seq()])
    want = logits.float().argmax(-1).tolist()
    assert [results[i].token for i in (0, 1, 3, 5)] == [want[i] for i in (0, 1, 3, 5)]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("penalty", [1e-45, 1e-38, 1e-3, 10.0])
@pytest.mark.parametrize("scale", [1.0, 1e30, 3e38])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_leave_finite_logits_finite(penalty, scale, temperature):
    logits = noise(1).clamp(-1, 1)[0] * scale
    logits[[1, 2, 3]] = torch.tensor([scale, -scale, 0.0])
    params = SamplingParams(
        temperature=temperature, repetition_penalty=penalty, frequency_penalty=-2.0, seed=3
    )
    result = one(logits, seq(params, output=[1, 2, 2, 3]))
    assert result.finite
    assert result.token is not None


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-39, 1e-50, 5e-324])
@pytest.mark.parametrize("cut", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_heat_near_nothing_draws_the_likeliest(temperature, cut):
    logits = noise(40)
    params = SamplingParams(temperature=temperature, seed=7, **cut)
    results = Sampler().sample(logits, [seq(params)] * 40)
    assert [result.token for result in results] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_fault_fails_its_row_and_no_neighbour(bad):
    rng = random.Random(1)
    rows = [random_sequence(rng) for _ in range(12)]
    logits = noise(12)
    clean = Sampler().sample(logits, rows)
    assert all(result.finite for result in clean)
    for row in range(12):
        broken = logits.clone()
        broken[row, 100] = bad
        results = Sampler().sample(broken, rows)
        assert results[row].token is None
        assert results[row].logprob is None
        assert not results[row].finite
        assert results[:row] + results[row + 1 :] == clean[:row] + clean[row + 1 :]


def test_forbidden_tokens_are_no_fault_unless_all_are():
    logits = torch.full((V,), -math.inf)
    assert not one(logits, seq()).finite
    assert not one(logits, seq(SamplingParams())).finite
    logits[17] = 0.0
    assert one(logits, seq()).token == 17
    assert one(logits, seq(SamplingParams())).token == 17
    masked = SamplingParams(min_tokens=1, stop_token_ids=frozenset({17}))
    assert not one(logits, seq(masked)).finite


def test_a_row_is_the_same_alone_and_in_any_batch():
    rng = random.Random(2)
    rows = [random_sequence(rng) for _ in range(40)]
    logits = noise(40)
    alone = [one(logits[i], rows[i]) for i in range(40)]
    for _ in range(12):
        order = rng.sample(range(40), rng.randrange(1, 41))
        mixed = Sampler().sample(logits[order].contiguous(), [rows[i] for i in order])
        assert mixed == [alone[i] for i in order]  # dataclass equality: every float bit for bit
    changed = [one(logits[i] + noise(1, seed=9)[0], rows[i]) for i in range(40)]
    assert changed != alone


def test_rows_are_independent_with_a_vocabulary_that_needs_full_sorts():
    params = [
        SamplingParams(temperature=t, top_p=p, top_k=k, seed=s, logprobs=5)
        for s, (t, p, k) in enumerate(
            [(3.0, 0.99, 0), (1.0, 0.5, 0), (3.0, 0.9, 3000), (0.7, 1.0, 40), (2.0, 1.0, 0)]
        )
    ]
    logits = noise(5, vocab=5003) / 2
    rows = [seq(p) for p in params]
    alone = [one(logits[i], rows[i]) for i in range(5)]
    assert Sampler().sample(logits, rows) == alone
    assert Sampler().sample(logits.flip(0), rows[::-1]) == alone[::-1]


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_matches_transformers(penalty):
    logits = noise(30)
    processor = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
    params = replace(GREEDY, repetition_penalty=penalty)
    differs = 0
    for i, row in enumerate(logits):
        top = row.topk(6).indices.tolist()[0 if penalty > 1 else 1 :]
        sequence = seq(params, prompt=[top[0], top[0], 5], output=top[1 : 1 + i % 5])
        want = processor(torch.tensor([sequence.tokens]), row[None].clone())[0]
        assert one(row, sequence).token == want.argmax().item()
        differs += want.argmax().item() != row.argmax().item()
    assert differs > 5


def test_presence_and_frequency_count_the_output_only():
    logits = torch.zeros(V)
    logits[10], logits[11] = 3.0, 2.0
    presence = replace(GREEDY, presence_penalty=1.5)
    assert one(logits, seq(presence, prompt=[10, 10])).token == 10
    assert one(logits, seq(presence, output=[10])).token == 11
    frequency = replace(GREEDY, frequency_penalty=0.4)
    assert one(logits, seq(frequency, output=[10, 10])).token == 10
    assert one(logits, seq(frequency, output=[10, 10, 10])).token == 11
    assert one(logits, seq(frequency, output=[10, 10, 10, 11])).token == 10
    assert one(logits, seq(replace(GREEDY, frequency_penalty=-0.6), output=[11] * 2)).token == 11


def test_bias_moves_the_choice():
    logits = noise(1)[0]
    best = logits.argmax().item()
    assert one(logits, seq(replace(GREEDY, logit_bias=((best, -100.0),)))).token != best
    assert one(logits, seq(replace(GREEDY, logit_bias=((33, 100.0), (34, 99.0))))).token == 33


def test_stop_tokens_wait_for_min_tokens():
    logits = noise(1)[0]
    best = logits.argmax().item()
    stops = frozenset({best, V + 1000})
    params = replace(GREEDY, min_tokens=2, stop_token_ids=stops)
    assert one(logits, seq(params)).token != best
    assert one(logits, seq(params, output=[8])).token != best
    assert one(logits, seq(params, output=[8, 8])).token == best
    biased = replace(params, logit_bias=((best, 100.0),))
    assert one(logits, seq(biased)).token != best


def test_logprobs_are_of_the_raw_distribution():
    logits = noise(1)[0].bfloat16()
    want = torch.log_softmax(logits.double(), -1)
    params = SamplingParams(
        temperature=0.2, top_k=3, logit_bias=((50, 100.0),), repetition_penalty=2.0, logprobs=4
    )
    result = one(logits, seq(params))
    assert result.token == 50
    assert result.logprob.token == 50
    assert result.logprob.logprob == pytest.approx(want[50].item(), abs=1e-5)
    ids = [token for token, _ in result.logprob.top]
    assert sorted(want[ids].tolist(), reverse=True) == want.topk(4).values.tolist()
    for token, value in result.logprob.top:
        assert value == pytest.approx(want[token].item(), abs=1e-5)


def test_each_row_gets_as_many_logprobs_as_it_asked_for():
    logits = noise(4)
    asked = [None, 0, 5, 2]
    rows = [seq(replace(GREEDY, logprobs=n)) for n in asked]
    results = Sampler().sample(logits, rows)
    assert results[0].logprob is None
    assert [len(r.logprob.top) for r in results[1:]] == [0, 5, 2]
    greedy = results[2].logprob
    assert greedy.top[0] == (greedy.token, greedy.logprob)


def test_equal_logprobs_are_listed_by_lowest_id():
    logits = torch.zeros(V)
    logits[5] = -0.0
    assert [t for t, _ in one(logits, seq(replace(GREEDY, logprobs=6))).logprob.top] == [*range(6)]
    logits[200] = 1.0
    assert one(logits, seq(replace(GREEDY, logprobs=2))).logprob.top[0][0] == 200


def test_prompt_logprobs_match_log_softmax_across_chunks(monkeypatch):
    monkeypatch.setattr("fader_server.model.distribution._CHUNK_ELEMENTS", 3 * V)
    logits = noise(10)
    targets = torch.arange(10) * 7
    got = Sampler().prompt_logprobs(logits, targets, 2)
    want = torch.log_softmax(logits.double(), -1)
    assert [entry.token for entry in got] == targets.tolist()
    for row, entry in enumerate(got):
        assert entry.logprob == pytest.approx(want[row, entry.token].item(), abs=1e-5)
        assert [t for t, _ in entry.top] == want[row].topk(2).indices.tolist()
    assert Sampler().prompt_logprobs(logits[4:5], targets[4:5], 2) == got[4:5]
    assert Sampler().prompt_logprobs(logits, targets, 0)[3].top == ()
    assert Sampler().prompt_logprobs(logits[:0], targets[:0], 2) == ()


def test_prompt_and_output_logprobs_agree():
    logits = noise(1)
    sampled = Sampler().sample(logits, [seq(replace(GREEDY, logprobs=3))])[0]
    (prompt,) = Sampler().prompt_logprobs(logits, torch.tensor([sampled.token]), 3)
    assert prompt == sampled.logprob


def test_tokens_that_the_model_reads_and_cannot_write_are_asked_nothing_of():
    """As where an output layer was pruned."""
    logits, beyond = noise(1), V + 7
    asked = replace(
        GREEDY,
        logprobs=2,
        logit_bias=((beyond, 100.0), (3, 50.0)),
        repetition_penalty=1.5,
        presence_penalty=1.0,
        stop_token_ids=(beyond,),
        min_tokens=9,
    )
    known = replace(asked, logit_bias=((3, 50.0),), stop_token_ids=())
    strange = Sampler().sample(logits, [seq(asked, prompt=(5, beyond), output=(beyond,))])
    assert strange == Sampler().sample(logits, [seq(known, prompt=(5,))])
    assert strange[0].token == 3
    (scored,) = Sampler().prompt_logprobs(logits, torch.tensor([beyond]), 1)
    assert (scored.token, scored.logprob) == (beyond, -math.inf)
    assert math.isfinite(Sampler().prompt_logprobs(logits, torch.tensor([V - 1]), 1)[0].logprob)


def test_an_empty_batch_gives_nothing():
    assert Sampler().sample(torch.empty(0, V), []) == []


@pytest.mark.parametrize("wrong", [False, True])
def test_a_row_of_guesses_is_one_whose_sequence_holds_them(wrong):
    """All rows of a sequence in one call, and each alone."""
    differs = 0
    for index in range(60):
        sequence = random_sequence(random.Random(index))
        start = len(sequence.tokens)
        guesses = tuple(random.Random(-index).choices(sequence.tokens, k=3))
        logits = noise(4, seed=index)
        rows = [PlanRow(sequence, start - 1, 1, True)]
        rows += [PlanRow(sequence, start - 1 + n, 1, True, guesses[:n]) for n in (1, 2, 3)]
        own = [replace(sequence, tokens=[*sequence.tokens, *guesses[:n]]) for n in range(4)]
        if wrong:
            own = [sequence] * 4
        alone = [one(x, s) for x, s in zip(logits, own, strict=True)]
        differs += Sampler().launch(logits, rows).wait() != alone
    assert bool(differs) == wrong
