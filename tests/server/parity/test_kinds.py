"""Every kind of LoRA against PEFT, and blends of them against dense fp64, in mixed batches."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.server.parity.test_families import BOUND, SCALE, check, difference, prompts
from tests.support.dense import DenseOracle
from tests.support.families import outside, write_family
from tests.support.oracle import Oracle
from tests.support.peft_adapters import write_adapter
from tests.support.world import Ask, TinyWorld, greedy

BACKENDS = ["auto", "reference"]
DORA = {"use_dora": True, "target_modules": "all-linear"}
BIAS = {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]}


def asks(blends: list[Mapping[str, float]], count: int = 8) -> list[Ask]:
    params = greedy(4, prompt_logprobs=0)
    return [Ask(p, blends[i % len(blends)], params) for i, p in enumerate(prompts(count))]


def world(source: Path, adapters: Mapping[str, Path], dtype: torch.dtype, backend) -> TinyWorld:
    found = TinyWorld(source, dtype=dtype, backend=backend)
    for name, path in adapters.items():
        found.load(name, path)
    return found


class Setting:
    """A family's base with one plain adapter and one of each kind."""

    def __init__(self, family: str, folder: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.source = write_family(family, folder / "base", scale=SCALE[dtype])
        own = {"plain": {}, "dora": DORA, "dora1": {**DORA, "use_rslora": True}}
        targets = outside(family)
        own["outside"] = {"target_modules": targets, "copies": True}
        own["outside_dora"] = {"target_modules": targets, "use_dora": True}
        own["head"] = {"target_modules": [targets[1]]}
        own["embedding"] = {"target_modules": [targets[0]]}
        if family == "llama":  # the only one whose projections have a bias to begin with
            own["bias"] = BIAS
        self.adapters = {
            name: write_adapter(self.source, folder / name, rank=4 + i, seed=i, **config)
            for i, (name, config) in enumerate(own.items())
        }

    def singles(self) -> list[Mapping[str, float]]:
        return [{}, *({name: 1.0} for name in self.adapters)]


@pytest.fixture(scope="module", params=["llama", "gemma3", "phi3", "gpt2"])
def exact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(request.param, tmp_path_factory.mktemp(request.param), torch.float32)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting("llama", tmp_path_factory.mktemp("rounded"), torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dora_and_biases_in_a_mixed_batch_equal_peft(exact: Setting, backend):
    mixed = asks(exact.singles())
    answers = world(exact.source, exact.adapters, torch.float32, backend).run(mixed)
    oracle = Oracle(exact.source, torch.float32, exact.adapters)
    check(oracle, mixed, answers, BOUND[torch.float32])
    (one,) = [i for i, ask in enumerate(mixed[:4]) if "dora" in ask.blend]
    plain = Ask(mixed[one].prompt, {}, mixed[one].params)
    assert difference(oracle, plain, answers[one], 10.0) > 100 * BOUND[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
def test_dora_and_biases_equal_peft_in_bf16(rounded: Setting, backend):
    mixed = asks(rounded.singles())
    answers = world(rounded.source, rounded.adapters, torch.bfloat16, backend).run(mixed)
    oracle = Oracle(rounded.source, torch.bfloat16, rounded.adapters)
    check(oracle, mixed, answers, BOUND[torch.bfloat16])


@pytest.mark.parametrize("backend", BACKENDS)
def test_blends_of_dora_equal_dense_mathematics(exact: Setting, backend):
    blends: list[Mapping[str, float]] = [
        {"dora": 0.6, "dora1": -0.5},
        {"plain": 1.0, "dora": 0.7},
        {},
        dict.fromkeys(exact.adapters, 0.5),
    ]
    mixed = asks(blends)
    answers = world(exact.source, exact.adapters, torch.float32, backend).run(mixed)
    oracle = DenseOracle(exact.source, exact.adapters)
    check(oracle, mixed, answers, BOUND[torch.float32])
    other = Ask(mixed[0].prompt, {"dora": 0.6, "dora1": -0.4}, mixed[0].params)
    assert difference(oracle, other, answers[0], 10.0) > 10 * BOUND[torch.float32]
