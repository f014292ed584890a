"""Configs of many causal families, tiny, each with the features that make it another one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tests.support.families import COMMON, VOCAB, WINDOW

MOE = {
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
"""Attention over a compressed cache."""


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e4, "rope_type": kind, **parameters}}


SLIDING = {
    "num_hidden_layers": 4,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
LONG = {
    "original_max_position_embeddings": 128,
    "short_factor": [1.0] * 16,
    "long_factor": [1 + 0.3 * i for i in range(16)],
}

_MANY: dict[str, tuple[str, Mapping[str, Any]]] = {
    "llama-yarn": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "llama-dynamic": ("llama", _rope("dynamic", factor=4.0)),
    "llama-llama3": (
        "llama",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=128,
        ),
    ),
    "llama-longrope": ("llama", _rope("longrope", factor=4.0, **LONG)),
    "phi3-longrope": (
        "phi3",
        {**_rope("longrope", **LONG), "original_max_position_embeddings": 128},
    ),
    "llama-head-80": ("llama", {"head_dim": 80, "num_key_value_heads": 1}),
    "apertus": ("apertus", {"attention_bias": True}),
    "apertus1.5": ("apertus1p5_text", {"output_vocab_size": 448}),  # reads more than it writes
    "codegen": ("codegen", {"n_embd": 128, "n_head": 4, "n_layer": 2, "rotary_dim": 16}),
    "cohere": ("cohere", {"use_qk_norm": True, "logit_scale": 0.25}),
    "cohere2": ("cohere2", {"num_hidden_layers": 4, "sliding_window": WINDOW}),
    "deepseek-v2": ("deepseek_v2", {**MOE, **LATENT}),
    "deepseek-v3": (
        "deepseek_v3",
        {
            **MOE,
            **LATENT,
            "v_head_dim": 64,
            **_rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=128,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
        },
    ),
    "ernie4.5": ("ernie4_5", {"use_bias": True}),
    "exaone4": (
        "exaone4",
        {
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
    ),
    "exaone": ("exaone", {}),
    "flint": ("flint", {**MOE, **SLIDING, "mlp_only_layers": [0]}),
    "gemma": ("gemma", {}),
    "glm4": ("glm4", {}),
    "gpt-bigcode": ("gpt_bigcode", {}),
    "gpt-j": ("gptj", {"n_embd": 128, "n_head": 4, "n_layer": 2, "rotary_dim": 16}),
    "gpt-neox": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt-oss": (
        "gpt_oss",
        {**MOE, **_rope("yarn", factor=4.0, original_max_position_embeddings=128), **SLIDING},
    ),
    "granite": (
        "granite",
        {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 2.0},
    ),
    "granite-moe": ("granitemoe", MOE),
    "granite-moe-swa": ("granitemoe_swa", {**MOE, **SLIDING}),
    "granite-swa": ("granite_swa", SLIDING),
    "hunyuan": ("hunyuan_v1_dense", {}),
    "hunyuan-moe": ("hunyuan_v1_moe", {**MOE, "moe_topk": 2}),
    "jetmoe": ("jetmoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),  # reads its routing
    "longcat-flash": (  # two attentions and MLPs a layer, experts that do nothing
        "longcat_flash",
        {
            **LATENT,
            "head_dim": 32,
            "qk_head_dim": 64,
            "num_layers": 2,
            "ffn_hidden_size": 192,
            "expert_ffn_hidden_size": 64,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
        },
    ),
    "mimo-v2-flash": ("mimo_v2_flash", {**MOE, **SLIDING}),
    "minicpm3": ("minicpm3", LATENT),
    "mixtral": ("mixtral", {**MOE, "sliding_window": WINDOW}),
    "olmo": ("olmo", {"clip_qkv": 0.5}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"num_hidden_layers": 4, "sliding_window": WINDOW}),
    "olmoe": ("olmoe", MOE),
    "opt": ("opt", {"word_embed_proj_dim": 64, "do_layer_norm_before": False}),
    "phi": ("phi", {"qk_layernorm": True, "partial_rotary_factor": 0.5}),
    "qwen2-yarn": (  # as the cards of Qwen tell to write it
        "qwen2",
        {
            **_rope("yarn", factor=4.0, original_max_position_embeddings=128),
            "max_position_embeddings": 128,
        },
    ),
    "qwen2-moe": ("qwen2_moe", {**MOE, "mlp_only_layers": [0]}),
    "qwen3-moe": ("qwen3_moe", {**MOE, "norm_topk_prob": True}),
    "sarvam-mla": ("sarvam_mla", {**MOE, **LATENT}),
    "sarvam-moe": ("sarvam_moe", MOE),
    "seed-oss": ("seed_oss", {"attention_bias": True, "attention_out_bias": True}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW, "use_bias": True}),
}


def known(
    families: Mapping[str, tuple[str, Mapping[str, Any]]],
) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Those that the installed transformers has."""
    return {name: found for name, found in families.items() if found[0] in CONFIG_MAPPING_NAMES}


MANY = known(_MANY)
"""Name → model type, and what its config says beside COMMON."""


def write_many(model_type: str, changes: Mapping[str, Any], target: Path) -> Path:
    """Save a random fp32 checkpoint; norms and biases are random too."""
    plain = transformers.AutoConfig.for_model(model_type)
    common = {
        k: v
        for k, v in COMMON.items()
        if (hasattr(plain, k) or k in plain.attribute_map)
        and not isinstance(getattr(type(plain), k, None), property)
    }
    config = type(plain)(**(common | dict(changes)))
    assert config.vocab_size == VOCAB
    config.initializer_range = 0.05
    torch.manual_seed(0)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                spread = 0.3 if "bias" in name else 1.0 if "sinks" in name else 0.1
                parameter.add_(torch.randn_like(parameter) * spread)
            elif parameter.std() < 0.03:
                parameter.normal_(std=0.05)
    model.save_pretrained(target)
    return target
