"""Token counts of penalised rows: right after every step, gone with their rows."""

import gc
import weakref
from collections import Counter

import torch

from fader_server.core import Request, SamplingParams, Sequence
from fader_server.model.sampler import Sampler
from fader_server.model.sampling_state import CountsTable
from tests.support.samplers import distributions  # noqa: F401

V = 50
PENALISED = SamplingParams(temperature=0.0, frequency_penalty=0.5, repetition_penalty=1.2)


def seq(name, prompt, params=PENALISED):
    return Sequence(Request(name, tuple(prompt), params), list(prompt))


def counted(counts):
    ids, times = counts.arrays()
    return dict(zip(ids.tolist(), times.tolist(), strict=True))


def test_counts_follow_the_tokens_over_many_steps():
    table = CountsTable()
    sequence = seq("a", [7, 7, 9])
    assert counted(table.refresh([sequence])[0]) == {7: 0, 9: 0}
    for step in range(400):
        sequence.tokens.append((step * step) % 211)
        output = Counter(sequence.tokens[3:])
        want = {token: output[token] for token in {7, 9, *output}}
        if step % 3 == 0:
            assert counted(table.refresh([sequence])[0]) == want


def test_counts_do_not_mix_sequences_and_restart_after_an_absence():
    table = CountsTable()
    a, b = seq("a", [1]), seq("b", [2])
    a.tokens.append(5)
    assert [counted(c) for c in table.refresh([a, b])] == [{1: 0, 5: 1}, {2: 0}]
    table.refresh([b])
    assert len(table) == 1
    a.tokens.append(5)
    assert [counted(c) for c in table.refresh([b, a])] == [{2: 0}, {1: 0, 5: 2}]


def test_a_shortened_or_replaced_history_is_counted_anew():
    table = CountsTable()
    a = seq("a", [1])
    a.tokens += [5, 6]
    table.refresh([a])
    del a.tokens[2:]
    assert counted(table.refresh([a])[0]) == {1: 0, 5: 1}
    a.tokens = [1, 8]
    assert counted(table.refresh([a])[0]) == {1: 0, 8: 1}


def test_state_leaves_with_its_rows():
    sampler = Sampler()
    rows = [seq(str(i), [1, 2]) for i in range(4)]
    plain = seq("plain", [1], SamplingParams(temperature=0.0))
    sampler.sample(torch.zeros(5, V), [*rows, plain])
    assert sampler.tracked == 4
    sampler.sample(torch.zeros(1, V), [plain])
    assert sampler.tracked == 0


def test_an_idle_sampler_keeps_no_adapter_alive():
    class Adapters(dict):
        pass

    adapters = Adapters()
    alive = weakref.ref(adapters)
    sequence = Sequence(Request("a", (1,), PENALISED, adapters=adapters), [1])
    sampler = Sampler()
    sampler.sample(torch.zeros(1, V), [sequence])
    del adapters
    gc.collect()
    assert alive() is not None  # the request still holds it
    del sequence
    gc.collect()
    assert alive() is None
    assert sampler.tracked == 1


def test_a_penalised_run_equals_one_that_counts_from_scratch():
    logits = torch.randn(60, V, generator=torch.Generator().manual_seed(1))
    sampler, kept, fresh = Sampler(), seq("a", [1, 2]), seq("b", [1, 2])
    for row in logits:
        kept.tokens.append(sampler.sample(row[None], [kept])[0].token)
        fresh.tokens.append(Sampler().sample(row[None], [fresh])[0].token)
    assert kept.tokens == fresh.tokens
    assert kept.tokens[2:] != logits.argmax(-1).tolist()
