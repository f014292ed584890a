"""One model twice: Phi3 with packed projections, Mistral with the same ones split."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
)

from tests.support.families import COMMON, WINDOW, write_family

ROWS = {"qkv_proj": (128, 64, 64), "gate_up_proj": (192, 192)}
"""Rows of each part, see COMMON."""
NAMES = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def write_pair(folder: Path) -> tuple[Path, Path]:
    """(packed, split) checkpoints of the same random weights."""
    packed, split = write_family("phi3", folder / "packed"), folder / "split"
    as_split(AutoModelForCausalLM.from_pretrained(packed)).save_pretrained(split)
    return packed, split


def as_split(model: PreTrainedModel) -> PreTrainedModel:
    """A Mistral with the weights of a Phi3, in fp32."""
    state = {}
    for name, weight in model.state_dict().items():
        owner = next((key for key in NAMES if f".{key}." in name), None)
        if owner is None:
            state[name] = weight
            continue
        for part, rows in zip(NAMES[owner], weight.split(ROWS[owner]), strict=True):
            state[name.replace(owner, part)] = rows.clone()
    config = MistralConfig(**COMMON, sliding_window=WINDOW, rms_norm_eps=model.config.rms_norm_eps)
    return _filled(config, state)


def as_packed(model: PreTrainedModel) -> PreTrainedModel:
    """A Phi3 with the weights of a Mistral, in fp32."""
    state = dict(model.state_dict())
    for packed, parts in NAMES.items():
        for name in [name for name in state if f".{parts[0]}." in name]:
            rows = [state.pop(name.replace(parts[0], part)) for part in parts]
            state[name.replace(parts[0], packed)] = torch.cat(rows)
    common = {key: value for key, value in COMMON.items() if key != "head_dim"}
    eps = model.config.rms_norm_eps
    return _filled(Phi3Config(**common, sliding_window=WINDOW, rms_norm_eps=eps), state)


def _filled(config: PretrainedConfig, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.load_state_dict(state)
    return model.float().eval()
