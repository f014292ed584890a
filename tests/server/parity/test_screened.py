"""Output layers that leave out what is not among the largest: the same tokens as in full."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fader_adapters.kernels import native
from fader_server.core import SamplingParams
from tests.server.parity.test_families import Setting
from tests.server.parity.test_many_families import adapters, asks
from tests.support.many_families import MANY, write_many
from tests.support.peft_adapters import write_adapter
from tests.support.solo_families import SOLO
from tests.support.world import Ask, TinyWorld, greedy

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not native.available(), reason="only native output layers are screened"),
]

QUICK = frozenset({"bloom", "gpt-oss", "opt", "phi", "qwen3.5"})
CHANGED = ("cohere", "dory", "gemma2", "gemma3n", "gemma4", "granite", "grok")
"""Families, by the beginnings of their names, that do something to logits."""
FAMILIES = {**MANY, **SOLO}
DRAWN = SamplingParams(temperature=0.8, top_k=6, top_p=0.9, max_tokens=8, seed=5)
RACED = SamplingParams(temperature=0.8, max_tokens=8, seed=5)


@pytest.fixture
def every_size(monkeypatch):
    """Tiny output layers are screened, too."""
    monkeypatch.setattr("fader_server.model.head.SCREENED", 0)


def left_out(world: TinyWorld) -> list[float]:
    """Shares of the logits that are missing, by step, from now on."""
    shares, launch = [], world.runner._sampler.launch

    def noting(logits, sequences, **others):
        if len(logits):
            shares.append((logits == -torch.inf).float().mean().item())
        return launch(logits, sequences, **others)

    world.runner._sampler.launch = noting
    return shares


def questions(world: TinyWorld) -> list[Ask]:
    """Few enough at a time, greedy and drawn in turn, of base, adapters and blends."""
    nucleus = replace(RACED, top_p=0.9)
    params = (greedy(8, logprobs=None), DRAWN, RACED, nucleus, replace(RACED, min_p=0.1))
    found = asks(world.base.max_positions)
    return [replace(ask, params=params[i % 5]) for i, ask in enumerate(found)]


def tokens(world: TinyWorld, given: list[Ask]) -> list[list[int]]:
    """Four at a time."""
    answers = [a for at in range(0, len(given), 4) for a in world.run(given[at : at + 4])]
    assert not any(answer.error for answer in answers)
    return [answer.tokens for answer in answers]


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in sorted(FAMILIES)],
)
def test_answers_are_those_of_whole_layers(family: str, tmp_path: Path, monkeypatch):
    base, found = write_many(*FAMILIES[family], tmp_path / "base"), []
    for size in (0, 1 << 40):
        monkeypatch.setattr("fader_server.model.head.SCREENED", size)
        world = TinyWorld(base)
        for name, path in adapters(base, tmp_path / str(size), world).items():
            world.load(name, path)
        shares = left_out(world)
        found.append(tokens(world, questions(world)))
        if world.base.screen is None:
            assert size or family.startswith(CHANGED)
            assert max(shares) == 0
        else:
            assert max(shares) > 0
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting("llama", tmp_path_factory.mktemp("llama"), torch.bfloat16)


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize(
    "params",
    [
        greedy(4),
        greedy(4, logprobs=None, prompt_logprobs=0),
        greedy(4, logprobs=None, repetition_penalty=1.3),
        greedy(4, logprobs=None, logit_bias=((7, 1.0),)),
        greedy(4, logprobs=None, min_tokens=4, stop_token_ids=frozenset({2})),
        SamplingParams(max_tokens=4, temperature=1e-3),
        SamplingParams(max_tokens=4, top_k=200),
        SamplingParams(max_tokens=4, top_k=200, top_p=0.5),
    ],
)
def test_who_asks_for_more_than_the_largest_gets_all_logits(llama: Setting, params):
    """And so does who shares a step with it, to the same tokens."""
    world = llama.world()
    shares = left_out(world)
    plain = Ask([5, 6, 7], {"r8": 1.0}, greedy(4, logprobs=None))
    (alone,) = world.run([plain])
    assert min(shares) > 0
    shares.clear()
    together = world.run([plain, replace(plain, params=params)])
    with_prompt = 1 if params.prompt_logprobs is not None else None
    assert max(shares[:with_prompt]) == 0
    assert together[0].tokens == alone.tokens


@pytest.mark.parametrize("heat", [0.01, 0.02, 1.0])
def test_a_nucleus_is_drawn_from_as_from_all(llama: Setting, monkeypatch, heat: float):
    """Beside greedy rows; of sharp ones most is left out, of flat ones nothing for long."""
    found = []
    for size in (0, 1 << 40):
        monkeypatch.setattr("fader_server.model.head.SCREENED", size)
        world = llama.world()
        shares = left_out(world)
        asked = [
            Ask([5, 6, 7 + i], {"r8": 1.0}, SamplingParams(heat, top_p=0.9, seed=i, max_tokens=24))
            for i in range(3)
        ]
        answers = world.run([*asked, Ask([5, 6, 7], {"r8": 1.0}, greedy(24, logprobs=None))])
        found.append([answer.tokens for answer in answers])
        assert len(found[-1][0]) == 24
        if size or heat == 1.0:
            assert sorted(shares)[len(shares) // 2] == 0
        else:
            assert max(shares) > 0.7  # three rows with one token each
    assert found[0] == found[1]


@pytest.mark.usefixtures("every_size")
def test_an_adapted_output_layer_is_computed_in_full_for_its_rows(llama: Setting, tmp_path: Path):
    world = llama.world()
    path = write_adapter(
        llama.source, tmp_path / "head", rank=8, seed=3, target_modules=["lm_head", "q_proj"]
    )
    world.load("head", path)
    shares = left_out(world)
    params = greedy(6, logprobs=None)
    adapted = Ask([9, 8, 7], {"head": 2.0}, params)
    (screened,) = world.run([adapted])
    assert max(shares) == 0
    (full,) = world.run([replace(adapted, params=greedy(6))])
    assert screened.tokens == full.tokens
    world.run([Ask([9, 8, 7], {"r8": 1.0}, params)])
    assert max(shares) > 0


@pytest.mark.usefixtures("every_size")
def test_the_codes_are_counted_and_can_be_left_out(llama: Setting, monkeypatch):
    screened = llama.world().base
    assert screened.screen is not None
    monkeypatch.setattr("fader_server.model.head.SCREENED", 1 << 40)
    plain = llama.world().base
    assert plain.screen is None
    assert screened.nbytes - plain.nbytes == screened.screen.nbytes > 0
