"""From where on activated adapters apply: PEFT's own search says so, and the definition."""

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora.variants import calculate_alora_offsets

from fader_adapters.spec import AdapterSpec, Blend, Digest, Term
from fader_server import phases
from fader_server.core import Request, SamplingParams
from fader_server.phases import Phase, last_occurrence, phases_of
from tests.support.activation import beginning, terms_at

IDS = st.sampled_from([0, 1, 2, 256, 257, 65536, 1 << 24, (1 << 32) - 1])
"""Ids whose bytes look like others', one byte further on."""


def by_peft(prompt: list[int], invocation: list[int]) -> int | None:
    config: dict[str, Any] = {"a": LoraConfig(alora_invocation_tokens=invocation)}
    (offset,) = calculate_alora_offsets(config, "a", torch.tensor([prompt]))
    return None if offset is None else len(prompt) - offset


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
@given(st.lists(IDS, min_size=1, max_size=30), st.lists(IDS, min_size=1, max_size=4))
def test_the_last_occurrence_is_pefts(prompt, invocation):
    found = last_occurrence(prompt, invocation)
    assert found == by_peft(prompt, invocation)
    assert found == (None if (at := beginning(prompt, invocation)) == float("inf") else at)


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
@pytest.mark.parametrize(
    ("prompt", "invocation", "at"),
    [
        ([7, 8, 1, 7, 8, 2], [7, 8], 3),  # the last of two
        ([7, 7, 7, 7], [7, 7], 2),  # of those that overlap, too
        ([1, 2, 1, 2, 1, 3], [1, 2, 1], 2),
        ([7, 8], [7, 8], 0),
        ([1, 7], [7, 8], None),  # half of it
        ([8], [7, 8], None),
        ([256, 256], [1], None),  # bytes across two tokens
    ],
)
def test_what_an_occurrence_is(prompt, invocation, at):
    assert last_occurrence(prompt, invocation) == by_peft(prompt, invocation) == at


def test_a_long_prompt_full_of_what_only_looks_like_it_takes_no_time():
    prompt = [256] * 200_000
    assert last_occurrence(prompt, [1]) is None
    assert last_occurrence([1, *prompt], [1]) == 0


def test_ids_of_no_vocabulary_are_left_to_who_checks_the_request():
    assert last_occurrence([-1, 7], [7]) is None
    assert last_occurrence([1 << 32, 7], [7]) is None


@dataclass(frozen=True)
class Data:
    spec: AdapterSpec
    flat: None = None


def version(name: str) -> Digest:
    return Digest(name * 64)


def made(prompt: list[int], terms: dict[str, float], activated: dict[str, tuple[int, ...]]):
    blend = Blend.of(Term(version(name), gamma) for name, gamma in terms.items())
    specs = [AdapterSpec(version(name), (), 1, activated.get(name, ())) for name in terms]
    data: Any = {spec.version: Data(spec) for spec in specs}
    return Request("r", tuple(prompt), SamplingParams(), blend, data)


def test_each_phase_has_the_terms_that_apply_there():
    rng = random.Random(5)
    seen = set()
    for _ in range(300):
        prompt = [rng.randint(0, 4) for _ in range(rng.randint(1, 24))]
        terms = {name: rng.choice([0.5, -1.0]) for name in rng.sample("abcd", rng.randint(0, 4))}
        request = made(prompt, terms, {"b": (1,), "c": (2, 3), "d": (1, 2, 4)})
        starts = [phase.start for phase in request.phases]
        assert starts == sorted({0, *starts})
        assert starts[-1] < len(prompt)
        for at, phase in zip(starts, request.phases, strict=True):
            assert phase.blend.terms == terms_at(request, at)
            assert Blend.of(phase.blend.terms) == phase.blend
        everywhere = [terms_at(request, position) for position in range(len(prompt) + 3)]
        changes = [p for p in range(1, len(everywhere)) if everywhere[p] != everywhere[p - 1]]
        assert starts == [0, *changes]
        seen.add(len(starts))
    assert seen == {1, 2, 3, 4}


def test_without_activated_adapters_there_is_one_phase():
    request = made([1, 2, 3], {"a": 1.0}, {})
    assert request.phases == (Phase(0, request.blend),)
    assert request.phases[0].blend is request.blend


def test_what_is_made_of_a_request_does_not_search_again(monkeypatch):
    request = made([1, 2, 3], {"a": 1.0}, {"a": (2,)})
    monkeypatch.setattr(phases, "last_occurrence", lambda *_: pytest.fail("searched"))
    assert replace(request, id="other").phases == request.phases
    with pytest.raises(pytest.fail.Exception):
        phases_of(request.prompt, request.blend, request.adapters)
