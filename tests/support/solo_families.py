"""Configs of families that mix tokens outside transformers' attention function, tiny."""

from collections.abc import Mapping
from typing import Any

from tests.support.families import WINDOW
from tests.support.many_families import LATENT, MOE, SLIDING, known

DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
"""Gated delta rules beside attention."""
KEYED = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_heads": 4,
    "linear_head_dim": 32,
}
JAMBA = {
    "num_hidden_layers": 3,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "mamba_d_state": 16,
    "mamba_dt_rank": 64,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16}
INDEXED = {**MOE, **LATENT, "index_topk": 32, "index_head_dim": 32, "index_n_heads": 32}
"""Attention to the keys that an indexer chooses, fewer than the tests' prompts have; with so many
heads it holds no two for equal."""
STATE_SPACE = {"layer_types": ["mamba", "attention"], **MAMBA2, "shared_intermediate_size": 192}

_SOLO: dict[str, tuple[str, Mapping[str, Any]]] = {
    "axk2": ("axk2", INDEXED),
    "bamba": ("bamba", {"attn_layer_indices": [1], **MAMBA2, "mamba_n_groups": 1}),
    "bloom": ("bloom", {}),
    "deepseek-v3.2": ("deepseek_v32", INDEXED),
    "diffllama": ("diffllama", {}),
    "dory": ("dory", {**SLIDING, "n_input_layers": 1, "n_output_layers": 1}),  # runs layers twice
    "falcon-7b": ("falcon", {}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-rw": (
        "falcon",
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "falcon-h1": ("falcon_h1", {**MAMBA2, "mamba_d_ssm": 256, "mamba_n_groups": 1}),
    "falcon-mamba": ("falcon_mamba", {"state_size": 16}),  # its dt_proj is no block wide
    "glm-moe-dsa": ("glm_moe_dsa", INDEXED),
    "granite-hybrid": ("granitemoehybrid", {**STATE_SPACE, "num_local_experts": 0}),
    "granite-hybrid-moe": ("granitemoehybrid", {**STATE_SPACE, **MOE}),
    "hy-v4": ("hy_v4", INDEXED),
    "jamba": ("jamba", {**JAMBA, "num_experts": 1}),
    "jamba-moe": ("jamba", {**JAMBA, **MOE, "expert_layer_period": 2}),
    "lara-mini": (
        "lara_mini",
        {
            **MOE,
            **DELTA,
            "num_hidden_layers": 3,
            "sliding_window": WINDOW,
            "layer_types": ["linear_attention", "sliding_attention", "full_attention"],
        },
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 192}),
    "lfm2-moe": (
        "lfm2_moe",
        {**MOE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    "llama4": (
        "llama4_text",
        {"attention_chunk_size": 32, "num_local_experts": 4, "intermediate_size_mlp": 192},
    ),
    "mamba": ("mamba", {"state_size": 16, "time_step_rank": 32, "use_bias": True}),
    "modernbert": ("modernbert-decoder", {}),
    "mpt": (
        "mpt",
        {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 512, "expansion_ratio": 2},
    ),
    "nemotron-h": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "mlp"],
            "num_hidden_layers": 3,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            "n_groups": 1,
        },
    ),
    "olmo-hybrid": ("olmo_hybrid", {**DELTA, "linear_num_key_heads": 4}),
    "phi-moe": ("phimoe", {**MOE, "sliding_window": 24}),
    "qwen3-next": ("qwen3_next", {**MOE, **DELTA}),
    "qwen3.5": ("qwen3_5_text", DELTA),
    "qwen3.5-moe": ("qwen3_5_moe_text", {**MOE, **DELTA}),
    "zaya": ("zaya", {"num_experts_per_tok": 1}),
    "zamba2": (
        "zamba2",
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "hybrid_layer_ids": [1],
            "mamba_d_state": 16,
            "n_mamba_heads": 8,
            "num_mem_blocks": 1,
            "use_mem_rope": True,
            "attention_hidden_size": 256,
            "attention_head_dim": 64,
            "num_query_groups": 4,
        },
    ),
}
SOLO = known(_SOLO)
"""Name → model type, and what its config says beside COMMON."""

BY_KEY: dict[str, tuple[str, Mapping[str, Any]]] = {
    "bailing-hybrid": ("bailing_hybrid", {**MOE, **LATENT, **KEYED}),
    "kimi-linear": ("kimi_linear", {**MOE, **LATENT, **KEYED}),
}
"""The same of families whose delta rules decay by key; attention is not for the native kernels."""
