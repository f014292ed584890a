"""Adapters that PEFT itself saved: our deltas are PEFT's."""

import json

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from fader_adapters.errors import AdapterInvalid
from fader_adapters.parse import read_adapter
from fader_adapters.source import CONFIG_FILE, LocalSources
from fader_adapters.spec import BaseSpec, Digest, LinearSpec

peft = pytest.importorskip("peft")


def make_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def make_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    )


def spec_of(model: nn.Module) -> BaseSpec:
    linears = []
    for path, module in model.named_modules():
        layer = next((int(part) for part in path.split(".") if part.isdigit()), None)
        if isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            linears.append(LinearSpec(path, inputs, outputs, layer, conv1d=True))
        elif isinstance(module, nn.Linear):
            linears.append(LinearSpec(path, module.in_features, module.out_features, layer))
    return BaseSpec(tuple(linears), Digest("0" * 64), "test")


def save(make, directory, *, embeddings=False, **config):
    """Train nothing, but fill A and B; returns the base, and PEFT's own ΔW [out, in] by path."""
    base = spec_of(make())
    model = peft.get_peft_model(make(), peft.LoraConfig(task_type="CAUSAL_LM", **config))
    random = torch.Generator().manual_seed(1)
    deltas = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=random) * 0.1
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            delta = module.get_delta_weight("default").detach()
            deltas[name] = delta.t() if isinstance(module.base_layer, Conv1D) else delta
    model.save_pretrained(str(directory), save_embedding_layers=embeddings)
    return base, deltas


CASES = {
    "llama": (make_llama, {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]}),
    "rslora": (make_llama, {"r": 4, "use_rslora": True, "target_modules": ["k_proj"]}),
    "all-linear": (make_llama, {"r": 2, "target_modules": "all-linear"}),
    "pattern": (make_llama, {"r": 2, "target_modules": r"model\.layers\.\d+\.mlp\.(up|gate)_proj"}),
    "one layer": (make_llama, {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "one layer and the head": (
        make_llama,
        {"target_modules": ["q_proj", "v_proj", "lm_head"], "layers_to_transform": [1]},
    ),
    "one layer and a whole path of another": (
        make_llama,
        {
            "target_modules": ["model.layers.0.self_attn.q_proj", "k_proj"],
            "layers_to_transform": [1],
        },
    ),
    "a whole path of another layer than the one": (
        make_llama,
        {"target_modules": ["model.layers.0.self_attn.q_proj"], "layers_to_transform": [1]},
    ),
    "a whole path that is excluded": (
        make_llama,
        {
            "target_modules": ["q_proj", "lm_head"],
            "exclude_modules": ["lm_head"],
            "layers_to_transform": [1],
        },
    ),
    "layer names": (
        make_llama,
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "exclude": (make_llama, {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}),
    "patterns": (
        make_llama,
        {
            "r": 8,
            "target_modules": ["q_proj", "v_proj", "o_proj"],
            "rank_pattern": {"model.layers.0.self_attn.q_proj": 2, r"layers\.1\..*v_proj": 3},
            "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 5, "o_proj": 7},
        },
    ),
    "head": (make_llama, {"target_modules": ["q_proj", "lm_head"]}),
    "gpt2": (
        make_gpt2,
        {"r": 4, "target_modules": ["c_attn", "c_fc", "attn.c_proj"], "fan_in_fan_out": True},
    ),
    "gpt2 all-linear": (make_gpt2, {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "gaussian": (make_llama, {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_deltas_are_those_of_peft(name, tmp_path):
    make, config = CASES[name]
    base, deltas = save(make, tmp_path / "adapter", **config)
    raw = LocalSources((tmp_path,)).fetch("adapter")
    parsed = read_adapter(raw, base, dtype=torch.float32)
    flat = torch.empty(parsed.spec.numel)
    parsed.write(flat)
    assert {base.linears[d.linear].path for d in parsed.spec.deltas} == set(deltas)
    for delta in parsed.spec.deltas:
        linear = base.linears[delta.linear]
        a = flat[delta.a_offset :][: delta.rank * linear.in_features].view(delta.rank, -1)
        bt = flat[delta.b_offset :][: delta.rank * linear.out_features].view(delta.rank, -1)
        torch.testing.assert_close(delta.scale * (bt.t() @ a), deltas[linear.path])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
    ],
    ids=str,
)
def test_what_peft_saves_of_unsupported_methods_is_refused(config, tmp_path):
    base, _ = save(make_llama, tmp_path / "adapter", target_modules=["q_proj"], **config)
    with pytest.raises(AdapterInvalid):
        read_adapter(LocalSources((tmp_path,)).fetch("adapter"), base, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore")
def test_dora_without_the_base_weights_is_refused_and_says_what_it_needs(tmp_path):
    base, _ = save(make_llama, tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(AdapterInvalid, match="name the base"):
        read_adapter(LocalSources((tmp_path,)).fetch("adapter"), base, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_the_head_saved_with_the_base_weight_names_the_remedy(tmp_path):
    base, _ = save(make_llama, tmp_path / "a", embeddings="auto", target_modules=["lm_head"])
    with pytest.raises(AdapterInvalid, match="name the base"):
        read_adapter(LocalSources((tmp_path,)).fetch("a"), base, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore")
def test_a_converted_pissa_adapter_is_accepted(tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa", r=4)
    base = spec_of(make_llama())
    model = peft.get_peft_model(make_llama(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1
    model.save_pretrained(
        str(tmp_path / "adapter"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    parsed = read_adapter(LocalSources((tmp_path,)).fetch("adapter"), base, dtype=torch.float32)
    assert parsed.report.ranks == (8,)


@pytest.mark.filterwarnings("ignore")
def test_every_field_peft_writes_today_is_known(tmp_path):
    """A new PEFT with new fields is seen here first; all of them are null, false or empty."""
    base, _ = save(make_llama, tmp_path / "adapter", target_modules=["q_proj"])
    fields = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert len(fields) > 25
    assert read_adapter(LocalSources((tmp_path,)).fetch("adapter"), base, dtype=torch.float32)
