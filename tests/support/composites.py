"""Tiny random models with towers for pictures or sound beside their text decoder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from fader_adapters.architecture import auto_class
from tests.support.families import COMMON
from tests.support.many_families import LATENT

ODD = 264
"""Width of the towers' MLPs: no multiple of NF4's 64, as the published ones' 4304 is none."""
TOWER = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
WINDOW = 9
KINDS = ["sliding_attention", "full_attention"]


def _gemma3() -> PretrainedConfig:
    text = {**COMMON, "sliding_window": WINDOW, "layer_types": KINDS, "query_pre_attn_scalar": 32}
    return transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text),
        vision_config={**TOWER, "intermediate_size": ODD, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=500,
        boi_token_index=501,
        eoi_token_index=502,
    )


def _gemma4() -> PretrainedConfig:
    """With per-layer inputs, and pictures that would be read in both directions."""
    text: dict[str, Any] = {
        **COMMON,
        "sliding_window": WINDOW,
        "layer_types": KINDS,
        "global_head_dim": 64,
        "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": 512,
        "use_bidirectional_attention": "vision",
    }
    return transformers.Gemma4Config(
        text_config=transformers.Gemma4TextConfig(**text),
        vision_config={
            **TOWER,
            "intermediate_size": ODD,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
        image_token_id=500,
        boi_token_id=501,
        eoi_token_id=502,
        audio_token_id=503,
        boa_token_id=504,
        eoa_token_index=505,
        video_token_id=506,
    )


TOWERS = {
    **TOWER,
    "intermediate_size": ODD,
    "image_size": 28,
    "patch_size": 14,
    "depth": 1,
    "num_heads": 2,
    "attention_heads": 2,
    "num_global_layers": 1,
    "intermediate_layers_indices": [0],
    "embed_dim": 136,
    "out_hidden_size": 128,
    "deepstack_visual_indexes": [0],
    "vision_use_head": False,
    "d_model": 128,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": ODD,
}
"""What each kind of tower knows of it."""
SPACE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}}
"""Positions in time, height and width; those of text are one number."""
HALF = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [4, 2, 2],
        "partial_rotary_factor": 0.5,
    }
}
EXPERTS = {
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
TEXTS: dict[str, dict[str, Any]] = {
    "aya_vision": {"sliding_window": WINDOW, "layer_types": KINDS},
    "cohere2_vision": {"sliding_window": WINDOW, "layer_types": KINDS},
    "exaone4_5": {"sliding_window": WINDOW, "layer_types": KINDS},
    "glm4v": HALF,
    "glm4v_moe": {**HALF, **EXPERTS},
    "glm46v": HALF,
    "idefics3": {},
    "internvl": {},
    "lighton_ocr": {},
    "llava": {},
    "llava_next": {},
    "llava_onevision": {},
    "mistral3": {},
    "mistral_large4": {**LATENT, **EXPERTS, "index_topk": 512},
    "mllama": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "paddleocr_vl": SPACE,
    "qwen2_audio": {},
    "qwen2_vl": SPACE,
    "qwen2_5_omni_thinker": SPACE,
    "qwen2_5_vl": SPACE,
    "qwen3_omni_moe_thinker": {**SPACE, **EXPERTS},
    "qwen3_vl": SPACE,
    "qwen3_vl_moe": {**SPACE, **EXPERTS},
    "smolvlm": {},
    "video_llava": {},
    "voxtral": {},
}
"""Model type → what the config of its text decoder says beside COMMON."""


REFUSED: dict[str, dict[str, Any]] = {"blip-2": {}, "paligemma": {}}
"""The same of models that cannot answer text alone, or not from left to right."""


def _with_towers(model_type: str) -> PretrainedConfig:
    plain: Any = transformers.AutoConfig.for_model(model_type)
    text = plain.get_text_config(decoder=True)
    parts = {}
    for name in plain.sub_configs:
        part = getattr(plain, name)
        wanted = COMMON | (TEXTS | REFUSED)[model_type] if part is text else TOWERS
        known = {key: value for key, value in wanted.items() if hasattr(part, key)}
        if isinstance(getattr(part, "image_size", None), list):
            known |= {key: [known[key]] * 2 for key in ("image_size", "patch_size")}
        parts[name] = type(part)(**known)
    return type(plain)(**parts)


COMPOSITES: dict[str, Callable[[], PretrainedConfig]] = {
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    **{name: partial(_with_towers, name) for name in TEXTS},
}


def write_composite(name: str, target: Path) -> Path:
    """Save a random fp32 checkpoint; norms and biases are random too."""
    torch.manual_seed(0)
    config: Any = COMPOSITES[name]() if name in COMPOSITES else _with_towers(name)
    model: PreTrainedModel = auto_class(config).from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.numel() > 1 and parameter.std() < 0.03:
                parameter.normal_(std=0.05)
    model.save_pretrained(target)
    return target
