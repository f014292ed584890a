"""Bases in the codes of other methods against transformers + PEFT over the weights that they are,
and over what transformers itself makes of the codes."""

from pathlib import Path

import pytest
import torch

from tests.adapters.weightspace.models import load_unchecked
from tests.adapters.weightspace.test_coded import published
from tests.server.parity.test_expert_adapters import ARENA, LIMITS, Summed, written
from tests.server.parity.test_families import BOUND, check, difference
from tests.server.parity.test_many_families import asks
from tests.support.oracle import nf4_oracle
from tests.support.published import change
from tests.support.world import Ask, TinyWorld

FAMILIES = {
    "mxfp4": "gpt-oss",
    "fp8-blocks": "qwen3-moe",
    "fp8-ragged": "deepseek-v3",
    "int4-group": "qwen3-moe",
    "float-channel": "qwen3-moe",
    "gptq": "qwen3-moe",
    "awq": "qwen3-moe",
}
QUICK = frozenset({("mxfp4", False), ("mxfp4", True), ("fp8-ragged", False)})


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        pytest.param(name, experts, marks=[] if (name, experts) in QUICK else pytest.mark.slow)
        for name in FAMILIES
        for experts in (False, True)
    ],
)
def test_mixed_batches_equal_peft_over_the_weights(name: str, experts: bool, tmp_path: Path):
    """Adapters of attention's linears, of experts and routers."""
    coded, plain = published(name, tmp_path, torch.float32)
    world = TinyWorld(coded, limits=LIMITS, arena=ARENA, quantize_experts=experts)
    given = written(FAMILIES[name], tmp_path, world, plain)
    for adapter, path in given.items():
        world.load(adapter, path)
    oracle = Summed(nf4_oracle(plain, torch.float32, experts=experts), torch.float32, given)
    questions = asks(world.base.max_positions)
    answers = world.run(questions)
    check(oracle, questions, answers, BOUND[torch.float32])
    other = Ask(questions[1].prompt, {"r8": 0.8}, questions[1].params)
    assert difference(oracle, other, answers[1], 1.0) > 10 * BOUND[torch.float32]


def test_wrong_scales_change_answers(tmp_path: Path):
    coded, plain = published("mxfp4", tmp_path, torch.float32)

    def nudged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v + 1 if k.endswith("1.mlp.experts.down_proj_scales") else v
                for k, v in tensors.items()}  # fmt: skip

    (of_base, *_) = asks(512)
    oracle = Summed(nf4_oracle(plain, torch.float32), torch.float32, {})
    found = []
    for _ in range(2):
        world = TinyWorld(coded, limits=LIMITS, arena=ARENA)
        found.append(difference(oracle, of_base, world.run([of_base])[0], 10.0))
        change(coded, nudged)
    assert found[0] <= BOUND[torch.float32]
    assert found[1] > 10 * BOUND[torch.float32]


def test_experts_are_what_transformers_dequantises(tmp_path: Path):
    """Nothing of the experts is rounded anew without --quantize-experts."""
    coded, _ = published("mxfp4", tmp_path, torch.bfloat16)
    world = TinyWorld(coded, limits=LIMITS, arena=ARENA, dtype=torch.bfloat16, backend="reference")
    theirs = load_unchecked(coded).state_dict()
    stacks = [path for path in theirs if path.endswith(("gate_up_proj", "down_proj"))]
    assert len(stacks) == 8
    for path in stacks:
        assert torch.equal(world.base.model.get_parameter(path), theirs[path])
