"""Sampler: distributions, truncation against transformers' processors, and seeds."""

from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fader_server.core import Request, SamplingParams, Sequence
from fader_server.model import gumbel, mass
from fader_server.model.gumbel import draw_key
from fader_server.model.sampler import Sampler
from tests.support.samplers import distributions  # noqa: F401


def draws(logits, params, count):
    """Tokens of `count` seeds at one position, in one batch."""
    rows = []
    for seed in range(count):
        request = Request(str(seed), (1,), SamplingParams(**{**params, "seed": seed}))
        rows.append(Sequence(request, [1]))
    results = Sampler().sample(logits.expand(count, -1).contiguous(), rows)
    return Counter(result.token for result in results)


def warped(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    steps = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    if min_p:
        steps.append(MinPLogitsWarper(min_p))
    ids = torch.zeros(1, 1, dtype=torch.long)
    return torch.softmax(steps(ids, logits[None].double())[0], -1)


def chi_square_per_degree(counts, probabilities):
    """About 1 for a fair sample; the spread is sqrt(2 / degrees)."""
    total = sum(counts.values())
    expected = probabilities * total
    big = expected >= 5
    seen = np.array([counts[token] for token in range(len(probabilities))], float)
    rest = np.append(seen[big], seen[~big].sum())
    want = np.append(expected[big], expected[~big].sum())
    used = want > 0
    return ((rest - want)[used] ** 2 / want[used]).sum() / max(1, used.sum() - 1)


CASES = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.5, "top_k": 9},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.7, "min_p": 0.02},
]


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_distribution_transformers_would_sample(case):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(4)) * 1.5
    counts = draws(logits, case, 6000)
    want = warped(logits, **case).numpy()
    assert all(want[token] > 0 for token in counts)
    assert chi_square_per_degree(counts, want) < 1.9
    flatter = warped(logits, **{**case, "temperature": case["temperature"] * 1.4}).numpy()
    assert chi_square_per_degree(counts, flatter) > 1.9


@pytest.mark.parametrize("vocab", [40, 700, 3001])
@pytest.mark.parametrize(
    "case",
    [
        {"top_k": 5},
        {"top_k": 600},
        {"top_p": 0.5},
        {"top_p": 0.999},
        {"top_p": 0.0001},
        {"min_p": 0.2},
        {"top_k": 30, "top_p": 0.6, "min_p": 0.01},
    ],
)
def test_the_kept_set_is_transformers_kept_set(vocab, case):
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    weight = mass.masses(logits - logits.amax(-1, keepdim=True))
    limits = mass.Limits(
        np.full(6, case.get("top_k", 0)),
        np.full(6, case.get("top_p", 1.0)),
        np.full(6, case.get("min_p", 0.0)),
    )
    kept = weight >= mass.edges(weight, limits)
    want = torch.stack([warped(row, **case) > 0 for row in logits])
    assert torch.equal(kept, want)
    assert not kept.all() or case.get("top_k", 0) >= vocab


def test_under_a_top_k_a_nucleus_lies_among_what_that_leaves():
    """Ties included: so many of the largest tell both edges. Without a top-k they may not."""
    differ = 0
    for seed in range(40):
        logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(seed)).mul(3).round()
        weight = mass.masses(logits - logits.amax(-1, keepdim=True))
        for top_k in ([1, 7, 40], [0, 7, 40]):
            limits = mass.Limits(np.array(top_k), np.array([0.97, 0.9, 1.0]), np.zeros(3))
            few, every = (mass._sorted_edges(weight, limits, head)[0] for head in (40, 2000))
            assert torch.equal(few[1:], every[1:])
            assert top_k[0] == 0 or torch.equal(few, every)
            differ += not torch.equal(few, every)
    assert differ > 3


def test_a_top_k_of_the_whole_vocabulary_cuts_nothing():
    """Not even what weighs nothing."""
    limits = mass.Limits(np.array([0, 7, 8, 10**9]), np.ones(4), np.zeros(4))
    assert mass.truncates(limits, 8).tolist() == [False, True, False, False]


def test_tokens_tied_at_the_edge_all_stay():
    weight = mass.masses(torch.tensor([[0.0, -1.0, -1.0, -2.0]]))
    one = mass.Limits(np.array([2]), np.array([1.0]), np.array([0.0]))
    assert (weight >= mass.edges(weight, one)).tolist() == [[True, True, True, False]]


def test_top_k_of_one_and_a_tiny_temperature_are_greedy():
    logits = torch.randn(300, generator=torch.Generator().manual_seed(3))
    best = logits.argmax().item()
    assert draws(logits, {"temperature": 2.0, "top_k": 1}, 50) == {best: 50}
    assert draws(logits, {"temperature": 1e-6}, 50) == {best: 50}
    assert len(draws(logits, {"temperature": 2.0}, 50)) > 10


def test_the_seed_and_the_position_decide_the_draw():
    logits = torch.zeros(5000)

    def token(seed, output_len):
        request = Request("r", (1,), SamplingParams(seed=seed))
        sequence = Sequence(request, [1, *[2] * output_len])
        return Sampler().sample(logits[None], [sequence])[0].token

    assert token(5, 3) == token(5, 3)
    assert len({token(5, n) for n in range(50)}) > 45
    assert len({token(seed, 0) for seed in range(-25, 25)}) > 45


def test_seeded_answers_stay_what_they_were():
    """Recorded values: a change here changes every seeded answer ever given."""
    keys = [draw_key(0, 0), draw_key(1, 0), draw_key(0, 1), draw_key(2**63 - 1, 0)]
    assert keys == KEYS
    assert draw_key(2**63 - 1, 0) != draw_key(-(2**63), 0)
    found = gumbel.noise(torch.tensor([0, -1]), 3)
    torch.testing.assert_close(found, torch.tensor(NOISE, dtype=torch.float64), rtol=1e-14, atol=0)


def test_one_seeds_answer_follows_the_distribution_too():
    """Token after token of one request, as of many seeds."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(4)) * 1.5
    rows = [
        Sequence(Request("r", (1,), SamplingParams(seed=7)), [1, *[2] * place])
        for place in range(6000)
    ]
    results = Sampler().sample(logits.expand(len(rows), -1).contiguous(), rows)
    tokens = [result.token for result in results]
    assert chi_square_per_degree(Counter(tokens), warped(logits).numpy()) < 1.9
    pairs, share = Counter(pairwise(tokens)), warped(logits)
    likely = share.topk(4).indices.tolist()
    for pair in product(likely, likely):
        expected = 6000 * share[list(pair)].prod().item()
        assert abs(pairs[pair] - expected) < 4.5 * expected**0.5


def test_noise_is_gumbels_over_keys_and_tokens():
    keys = torch.tensor([draw_key(seed, place) for seed in range(40) for place in range(40)])
    noise = gumbel.noise(keys, 500)
    for values in (noise, noise[:, :1], noise[::97], noise[7]):
        share = (-(-values).exp()).exp().flatten().numpy()  # uniform, if they are
        counts = np.histogram(share, bins=10, range=(0, 1))[0]
        expected = share.size / 10
        assert ((counts - expected) ** 2 / expected).sum() < 27.9  # 0.999 quantile, 9 degrees
    for one, other in ((noise[:-1], noise[1:]), (noise[:, :-1], noise[:, 1:])):
        assert abs(np.corrcoef(one.flatten().numpy(), other.flatten().numpy())[0, 1]) < 0.005


KEYS = [-5591369968831625016, -3600904662233352620, 2012481149599441470, 4028478696975405459]
NOISE = [
    [2.0868436769674386, 0.17385007634518215, -1.290089817813329],
    [2.1882448355261865, 2.391846183655574, -0.41639530424226173],
]
