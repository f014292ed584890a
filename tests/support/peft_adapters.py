"""Random LoRA adapters written by PEFT itself, with B that is not zero."""

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model


def write_adapter(
    base: Path, target: Path, *, rank: int, seed: int, scale: float = 0.02, **config: Any
) -> Path:
    """Train nothing, draw A and B at random, save as PEFT does."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = {
        "target_modules": "all-linear",
        "lora_alpha": 2 * rank,
        "fan_in_fan_out": model.config.model_type == "gpt2",
    } | config
    peft = get_peft_model(model, LoraConfig(r=rank, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_A" in name:
                parameter.normal_(std=0.1)
            elif "lora_B" in name:
                parameter.normal_(std=scale / rank**0.5)
    peft.save_pretrained(target)
    return target
