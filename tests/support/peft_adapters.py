"""Random LoRA adapters written by PEFT itself, with B that is not zero."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from fader_adapters.architecture import auto_class
from fader_adapters.source import WEIGHTS_FILE

TIED = "Model (has|with) .?tie_word_embeddings.*|.*ensure_weight_tying.*"
"""What PEFT has to say about adapters of tied embeddings."""

PATTERNS = "The following (rank|alpha)_pattern keys did not match.*"
"""What it has to say of experts, whose names it makes patterns of and then looks for in modules."""


def write_adapter(
    base: Path,
    target: Path,
    *,
    rank: int,
    seed: int,
    scale: float = 0.02,
    copies: bool = False,
    rows: Sequence[int] | None = None,
    **config: Any,
) -> Path:
    """Train nothing, draw what is trained at random, save as PEFT does.

    copies  with the base's embedding and head
    rows    of modules that are trained whole, those that change; None: all
    """
    model = auto_class(transformers.AutoConfig.from_pretrained(base)).from_pretrained(base)
    settings = {
        "target_modules": "all-linear",
        "lora_alpha": 2 * rank,
        "fan_in_fan_out": model.config.model_type == "gpt2",
    } | config
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=TIED)
        # a Conv1D's setting at the head, a plain linear
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True")
        warnings.filterwarnings("ignore", message=PATTERNS)
        peft = get_peft_model(model, LoraConfig(r=rank, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_A" in name or "lora_embedding_A" in name:
                parameter.normal_(std=0.1)
            elif "lora_B" in name or "lora_embedding_B" in name:
                parameter.normal_(std=scale / rank**0.5)
            elif "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif "trainable_tokens_delta" in name:
                parameter.add_(parameter.std() * torch.randn_like(parameter))
            elif "modules_to_save" in name:
                noise = 0.5 * parameter.std() * torch.randn_like(parameter)
                some = slice(None) if rows is None else list(rows)
                parameter[some] += noise[some]
    peft.create_or_update_model_card = lambda folder: None  # a README that nothing here reads
    with warnings.catch_warnings():
        # PEFT takes the bias of a B for a B that was not gathered, and tells when it saves copies
        warnings.filterwarnings("ignore", message=".*LoRA tensor.*|.*save_embedding_layers.*")
        peft.save_pretrained(target, save_embedding_layers=copies)
    return target


COPIES = (".base_layer.weight", ".original_module.weight", "embed_tokens.weight", "wte.weight")


def train_copies(adapter: Path, rows: Sequence[int] | slice) -> None:
    """Change the copies of the base's weights in a folder, which PEFT loads into the base itself:
    both ends of a tied one alike."""
    tensors = load_file(adapter / WEIGHTS_FILE)
    copies = [name for name in tensors if name.endswith(COPIES)]
    if not any("modules_to_save" in name for name in tensors):
        copies += [name for name in tensors if name.endswith("lm_head.weight")]
    assert copies
    for name in copies:
        random = torch.Generator().manual_seed(9)
        noise = torch.randn(tensors[name].shape, generator=random) * tensors[name].std() / 2
        some = rows if isinstance(rows, slice) else list(rows)
        tensors[name][some] += noise[some]
    save_file(tensors, adapter / WEIGHTS_FILE, metadata={"format": "pt"})
