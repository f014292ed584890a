"""Tiny random models of every supported family, with the features that family has."""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

VOCAB = 512
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 24
"""Smaller than the prompts the parity tests use, so that a window that is ignored shows."""


def _llama() -> PretrainedConfig:
    return transformers.LlamaConfig(**COMMON, attention_bias=True, tie_word_embeddings=False)


def _mistral() -> PretrainedConfig:
    return transformers.MistralConfig(**COMMON, sliding_window=WINDOW)


def _qwen2() -> PretrainedConfig:
    return transformers.Qwen2Config(
        **COMMON, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    )


def _qwen3() -> PretrainedConfig:
    return transformers.Qwen3Config(**COMMON, tie_word_embeddings=True)


def _gemma2() -> PretrainedConfig:
    return transformers.Gemma2Config(
        **COMMON,
        sliding_window=WINDOW,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
        query_pre_attn_scalar=32,
    )


def _gemma3() -> PretrainedConfig:
    return transformers.Gemma3TextConfig(
        **{**COMMON, "num_hidden_layers": 3},
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=32,
    )


def _phi3() -> PretrainedConfig:
    common = {k: v for k, v in COMMON.items() if k != "head_dim"}
    return transformers.Phi3Config(**common, sliding_window=WINDOW)


def _gpt2() -> PretrainedConfig:
    return transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=128,
        n_layer=2,
        n_head=4,
        n_positions=512,
        bos_token_id=1,
        eos_token_id=2,
    )


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
}


def write_family(family: str, target: Path, *, seed: int = 0, scale: float = 0.05) -> Path:
    """Save a random fp32 checkpoint of `family`; norms and biases are random too.

    `scale` is the standard deviation of the weights.
    """
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config.initializer_range = scale
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * (0.3 if "bias" in name else 0.1))
    model.save_pretrained(target)
    return target


def outside(family: str) -> list[str]:
    """target_modules for the embedding, the head and one linear of every layer."""
    return ["wte", "lm_head", "c_fc"] if family == "gpt2" else ["embed_tokens", "lm_head", "o_proj"]
