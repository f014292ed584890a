"""Adapters whose embedding or head was trained whole, against PEFT, in mixed batches and blends."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fader_adapters.kernels import native
from fader_adapters.source import WEIGHTS_FILE
from tests.server.parity.test_families import AUTO_FIRST, BOUND, SCALE, check, difference, prompts
from tests.server.parity.test_kinds import asks, world
from tests.support.dense import DenseOracle
from tests.support.families import outside, write_family
from tests.support.lanes import merge, publish, weights_hash
from tests.support.oracle import Oracle
from tests.support.peft_adapters import train_copies, write_adapter
from tests.support.world import Answer, Ask, TinyWorld, greedy

SOME = range(3, 60, 2)
"""Tokens of the prompts, and fewer than half of the width."""


def settings(family: str) -> dict[str, dict[str, Any]]:
    table, head, inside = outside(family)
    found: dict[str, dict[str, Any]] = {
        "both": {"modules_to_save": [head, table]},
        "head": {"modules_to_save": [head]},
        "table": {"modules_to_save": [table]},
        "some_of_head": {"modules_to_save": [head], "rows": SOME},
        "some_of_table": {"modules_to_save": [table], "rows": SOME},
        "copies": {"copies": True},
        "on_a_copy": {"copies": True, "target_modules": [table, head, inside]},
        "head_beside_copies": {"modules_to_save": [head], "copies": True},
    }
    if family in ("gemma3", "gpt2"):  # of gpt2 PEFT saves it in other words
        found["tied"] = {"modules_to_save": [head], "ensure_weight_tying": True}
    if family == "gemma3":
        found["head_on_tokens"] = {
            "target_modules": [head, inside],
            "trainable_token_indices": list(SOME),
        }
    return {name: {"target_modules": [inside], **given} for name, given in found.items()}


TRAINED = {"on_a_copy": slice(None), "head_beside_copies": SOME}
"""Whose copies of the base's weights are trained after all, and which rows."""


class Setting:
    """A family's base with such adapters."""

    def __init__(self, family: str, folder: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.source = write_family(family, folder / "base", scale=SCALE[dtype])
        self.adapters: dict[str, Path] = {}
        for seed, (name, given) in enumerate(settings(family).items()):
            self.adapters[name] = write_adapter(
                self.source, folder / name, rank=4, seed=seed, **given
            )
            if name in TRAINED:
                train_copies(folder / name, TRAINED[name])

    def oracle(self, name: str) -> Oracle:
        """A base of its own: what PEFT loads of a copy changes that."""
        return Oracle(self.source, self.dtype, {name: self.adapters[name]})

    def world(self, backend) -> TinyWorld:
        return world(self.source, self.adapters, self.dtype, backend)

    def check(self, mixed: list[Ask], answers: list[Answer]) -> None:
        """Every adapter against PEFT; that it does something is asked of the base's answers."""
        plain = Oracle(self.source, self.dtype, {})
        for name in self.adapters:
            own = [(a, b) for a, b in zip(mixed, answers, strict=True) if name in a.blend]
            assert own
            check(self.oracle(name), *map(list, zip(*own, strict=True)), BOUND[self.dtype])
            ask, answer = max(own, key=lambda pair: len(pair[0].prompt))
            far = difference(plain, Ask(ask.prompt, {}, ask.params), answer, 100.0)
            assert far > 20 * BOUND[torch.float32], name
        others = [(a, b) for a, b in zip(mixed, answers, strict=True) if not a.blend]
        check(plain, *map(list, zip(*others, strict=True)), BOUND[self.dtype])


@pytest.fixture(
    scope="module", params=["llama", "gemma3", "gpt2", pytest.param("phi3", marks=pytest.mark.slow)]
)
def exact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(request.param, tmp_path_factory.mktemp(request.param), torch.float32)


@pytest.fixture(scope="module", params=["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def rounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(request.param, tmp_path_factory.mktemp("rounded"), torch.bfloat16)


def mixture(setting: Setting) -> list[Ask]:
    blends: list[Mapping[str, float]] = [{}, *({name: 1.0} for name in setting.adapters)]
    return asks(blends, count=2 * len(blends))


@pytest.mark.parametrize("backend", AUTO_FIRST)
def test_a_mixed_batch_equals_peft(exact: Setting, backend):
    mixed = mixture(exact)
    exact.check(mixed, exact.world(backend).run(mixed))


@pytest.mark.parametrize("backend", AUTO_FIRST)
def test_a_mixed_batch_equals_peft_in_bf16(rounded: Setting, backend):
    mixed = mixture(rounded)
    rounded.check(mixed, rounded.world(backend).run(mixed))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_answers_are_bitwise_what_they_are_alone(exact: Setting, backend):
    mixed = mixture(exact)
    together, alone = exact.world(backend).run(mixed), exact.world(backend)
    for ask, answer in zip(mixed, together, strict=True):
        (by_itself,) = alone.run([ask])
        assert _facts(by_itself) == _facts(answer), ask.blend


def _facts(answer: Answer) -> tuple[object, ...]:
    return answer.tokens, answer.logprobs, answer.prompt_logprobs, answer.error


BLENDS: list[Mapping[str, float]] = [
    {"both": 0.6},
    {"head": -0.5, "table": 1.5},
    {"some_of_head": 0.7, "some_of_table": 0.3, "both": 0.5},
    {},
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_blend_has_gamma_times_the_difference(exact: Setting, backend):
    mixed = asks(BLENDS)
    answers = exact.world(backend).run(mixed)
    oracle = DenseOracle(exact.source, exact.adapters)
    check(oracle, mixed, answers, BOUND[torch.float32])
    for ask, answer in zip(mixed[4:], answers[4:], strict=True):
        for name, gamma in ask.blend.items():
            other = Ask(ask.prompt, {**ask.blend, name: gamma - 0.1}, ask.params)
            far = 10 * BOUND[torch.float32]
            assert difference(oracle, other, answer, 10.0) > far, (ask.blend, name)


@pytest.mark.parametrize("name", ["both", "some_of_table", "some_of_head", "on_a_copy"])
def test_one_row_that_is_not_the_saved_one_would_be_noticed(exact: Setting, name, tmp_path):
    prompt = list(prompts(4)[3])
    prompt[5] = SOME[4]
    found = exact.world("auto")
    other = shutil.copytree(exact.adapters[name], tmp_path / "other")
    tensors = load_file(other / WEIGHTS_FILE)
    for key, tensor in tensors.items():
        if "lora" not in key:
            tensor[SOME[4]] *= 1.02
    save_file(tensors, other / WEIGHTS_FILE, metadata={"format": "pt"})
    found.load("other", other)
    params = greedy(2, prompt_logprobs=0)
    oracle, bound = exact.oracle(name), BOUND[torch.float32]
    own, moved = found.run([Ask(prompt, {n: 1.0}, params) for n in (name, "other")])
    ask = Ask(prompt, {name: 1.0}, params)
    assert difference(oracle, ask, own, 10.0) < bound < difference(oracle, ask, moved, 10.0)


@pytest.mark.parametrize("backend", AUTO_FIRST)
def test_a_merged_lane_equals_peft_and_leaves_the_base_alone(exact: Setting, backend):
    found = exact.world(backend)
    before = weights_hash(world(exact.source, {}, exact.dtype, backend).base.installed)
    for name in exact.adapters:
        if name == "copies":
            continue  # plain LoRA
        publish(found, merge(found, {name: 1.0}, form="nf4" if name == "head" else "bf16"))
        found.plans.clear()
        mixed = asks([{name: 1.0}], count=3)
        answers = found.run(mixed)
        assert all(plan.terms.idle for plan in found.plans), "a merged row has no delta work"
        if name != "head":  # its layers are rounded again
            check(exact.oracle(name), mixed, answers, BOUND[torch.float32])
    assert weights_hash(found.base.installed) == before
    blend = BLENDS[2]
    publish(found, merge(found, blend, form="bf16"))
    mixed = asks([blend], count=3)
    oracle = DenseOracle(exact.source, exact.adapters)
    check(oracle, mixed, found.run(mixed), BOUND[torch.float32])


@pytest.mark.skipif(not native.available(), reason="only native output layers are screened")
def test_a_screened_head_leaves_nothing_out_for_rows_whose_head_is_replaced(
    exact: Setting, monkeypatch
):
    mixed = [Ask(prompt, {}, greedy(6)) for prompt in prompts(4)]
    mixed += [Ask(p, {n: 1.0}, greedy(6)) for n in ("head", "some_of_head") for p in prompts(2)]
    found = []
    for size in (0, 1 << 40):
        monkeypatch.setattr("fader_server.model.head.SCREENED", size)
        screened = exact.world("auto")
        assert (screened.base.screen is None) == bool(size)
        found.append(
            [_facts(answer)[:2] for at in (0, 4) for answer in screened.run(mixed[at : at + 4])]
        )
    assert found[0] == found[1]
