"""Every kind of LoRA against PEFT, and blends of them against dense fp64, in mixed batches."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fader_adapters.kernels.backend import BackendName
from tests.server.parity.test_families import AUTO_FIRST, BOUND, SCALE, check, difference, prompts
from tests.support.dense import DenseOracle
from tests.support.families import outside, write_family
from tests.support.oracle import Oracle
from tests.support.peft_adapters import write_adapter
from tests.support.world import Ask, TinyWorld, greedy

BACKENDS: list[BackendName] = ["auto", "reference"]
DORA = {"use_dora": True, "target_modules": "all-linear"}
TOKENS = list(range(3, 200, 5))
BIAS = {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]}


def asks(blends: list[Mapping[str, float]], count: int = 8) -> list[Ask]:
    params = greedy(4, prompt_logprobs=0)
    return [Ask(p, blends[i % len(blends)], params) for i, p in enumerate(prompts(count))]


def world(source: Path, adapters: Mapping[str, Path], dtype: torch.dtype, backend) -> TinyWorld:
    found = TinyWorld(source, dtype=dtype, backend=backend)
    for name, path in adapters.items():
        found.load(name, path)
    return found


def kinds(family: str) -> list[dict[str, dict[str, Any]]]:
    """Adapters by name, in groups that PEFT can hold in one model."""
    table, head, inside = outside(family)
    low_rank: dict[str, dict[str, Any]] = {
        "plain": {},
        "dora": DORA,
        "dora1": {**DORA, "use_rslora": True},
        "outside": {"target_modules": outside(family), "copies": True},
        "outside_dora": {"target_modules": outside(family), "use_dora": True},
        "head": {"target_modules": [head]},
        "embedding": {"target_modules": [table]},
    }
    rows = {"target_modules": [inside], "trainable_token_indices": TOKENS}
    groups = [low_rank, {"tokens": rows}]
    if family == "llama":  # whose projections have a bias to begin with, and two tables
        low_rank["bias"] = BIAS
        by_name = {table: TOKENS[:3], head: TOKENS[2:]}
        groups.append({"two_tables": {**rows, "trainable_token_indices": by_name}})
    if family == "gemma3":  # which has one table for the embedding and the head, and scales it
        groups[1]["tied_tokens"] = {**rows, "ensure_weight_tying": True}
    if family in ("gemma3", "gpt2"):  # of gpt2, whose names it does not know, PEFT ties nothing
        groups.append({"tied": {"target_modules": [table], "ensure_weight_tying": True}})
    return groups


class Setting:
    """A family's base with an adapter of each kind."""

    def __init__(self, family: str, folder: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.source = write_family(family, folder / "base", scale=SCALE[dtype])
        self.groups = [
            {
                name: write_adapter(self.source, folder / name, rank=4 + i, seed=i, **config)
                for i, (name, config) in enumerate(group.items())
            }
            for group in kinds(family)
        ]
        self.adapters = {name: path for group in self.groups for name, path in group.items()}

    def check(self, backend: BackendName) -> None:
        """All kinds in one batch, each against PEFT; a row of the base must be far from all."""
        mixed = asks([{}, *({name: 1.0} for name in self.adapters)], count=16)
        answers = world(self.source, self.adapters, self.dtype, backend).run(mixed)
        bound = BOUND[self.dtype]
        for group in self.groups:
            oracle = Oracle(self.source, self.dtype, group)
            for ask, answer in zip(mixed, answers, strict=True):
                if ask.blend.keys() <= group.keys():
                    check(oracle, [ask], [answer], bound)
                if ask.blend.keys() & group.keys() and len(ask.prompt) > 8 and bound < 1e-3:
                    base = Ask(ask.prompt, {}, ask.params)
                    assert difference(oracle, base, answer, 10.0) > 20 * bound, ask.blend


@pytest.fixture(
    scope="module",
    params=["llama", "gemma3", pytest.param("phi3", marks=pytest.mark.slow), "gpt2"],
)
def exact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(request.param, tmp_path_factory.mktemp(request.param), torch.float32)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting("llama", tmp_path_factory.mktemp("rounded"), torch.bfloat16)


@pytest.mark.parametrize("backend", AUTO_FIRST)
def test_every_kind_in_a_mixed_batch_equals_peft(exact: Setting, backend):
    exact.check(backend)


@pytest.mark.parametrize("backend", AUTO_FIRST)
def test_every_kind_in_a_mixed_batch_equals_peft_in_bf16(rounded: Setting, backend):
    rounded.check(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blends_of_dora_equal_dense_mathematics(exact: Setting, backend):
    blends: list[Mapping[str, float]] = [
        {"dora": 0.6, "dora1": -0.5},
        {"plain": 1.0, "dora": 0.7},
        {},
        dict.fromkeys(exact.groups[0], 0.5),
    ]
    mixed = asks(blends)
    answers = world(exact.source, exact.adapters, torch.float32, backend).run(mixed)
    oracle = DenseOracle(exact.source, exact.adapters)
    check(oracle, mixed, answers, BOUND[torch.float32])
    other = Ask(mixed[0].prompt, {"dora": 0.6, "dora1": -0.4}, mixed[0].params)
    assert difference(oracle, other, answers[0], 10.0) > 10 * BOUND[torch.float32]
