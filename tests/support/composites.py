"""Tiny random models with a tower for pictures beside their text decoder."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from tests.support.families import COMMON

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


COMPOSITES = {"gemma3": _gemma3, "gemma4": _gemma4}


def write_composite(name: str, target: Path) -> Path:
    """Save a random fp32 checkpoint; norms and biases are random too."""
    torch.manual_seed(0)
    config: Any = COMPOSITES[name]()
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.numel() > 1 and parameter.std() < 0.03:
                parameter.normal_(std=0.05)
    model.save_pretrained(target)
    return target
