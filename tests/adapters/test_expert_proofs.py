"""What a mixture's modules compute decides whether adapters may change them."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, PreTrainedModel

from fader_adapters import attach
from fader_adapters.describe import describe
from fader_adapters.expert_proofs import unproven

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4,
}  # fmt: skip
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES),
    "gpt-oss": GptOssConfig(**SIZES, head_dim=32, num_experts_per_tok=2),
}


@pytest.fixture(params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    for parameter in made.parameters():
        parameter.data.normal_(std=0.2)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtures_by_the_interface_are_targets(model: PreTrainedModel, dtype: torch.dtype):
    model.to(dtype)
    spec = describe(model)
    assert unproven(model, spec) == set()
    assert [item.role for item in spec.linears].count("experts") == 4
    assert [item.role for item in spec.linears].count("router") == 2


def test_experts_that_do_more_are_no_targets_and_stay_as_they_are(model: PreTrainedModel):
    experts = model.model.layers[1].mlp.experts
    inner = experts.forward

    def more(*args: torch.Tensor) -> torch.Tensor:
        return inner(*args) * 1.01

    experts.forward = more
    strange = unproven(model, describe(model))
    assert strange == {f"model.layers.1.mlp.experts.{n}" for n in ("gate_up_proj", "down_proj")}
    ids = torch.arange(20).view(1, -1)
    with torch.inference_mode():
        before = model(ids).logits
        lora = attach(model, backend="reference")
        assert experts.forward is more
        assert "experts" in lora._installed.spec.left_out
        torch.testing.assert_close(model(ids).logits, before, atol=1e-4, rtol=1e-4)


def test_a_router_that_multiplies_twice_is_no_target(model: PreTrainedModel):
    block = model.model.layers[0].mlp
    name, router = next((n, m) for n, m in block.named_children() if n != "experts")
    inner = router.forward

    def twice(x: torch.Tensor) -> object:
        return inner(x + 0 * F.linear(F.linear(x, router.weight), router.weight.T))

    router.forward = twice
    assert unproven(model, describe(model)) == {f"model.layers.0.mlp.{name}"}


def test_modules_that_are_called_otherwise_are_no_targets(model: PreTrainedModel):
    block = model.model.layers[0].mlp
    name, router = next((n, m) for n, m in block.named_children() if n != "experts")
    inner = router.forward
    router.forward = lambda x, y: inner(x)
    block.experts.forward = lambda x: x
    assert unproven(model, describe(model)) == {
        f"model.layers.0.mlp.{path}" for path in (name, "experts.gate_up_proj", "experts.down_proj")
    }
