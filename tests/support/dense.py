"""What adapters do, as dense weights in fp64, read from their files by hand: no PEFT, no Fader."""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from tests.support.oracle import nf4_oracle


class DenseOracle:
    """The NF4 base in fp64, its weights changed by a blend: W + Σ γ·(W′ − W)."""

    def __init__(self, source: Path, adapters: Mapping[str, Path]) -> None:
        self._base = nf4_oracle(source, torch.float32).double()
        self._adapters = adapters

    def logits(self, tokens: Sequence[int], blend: Mapping[str, float]) -> torch.Tensor:
        """[len(tokens), vocab] in fp64."""
        model = copy.deepcopy(self._base)
        for name, gamma in blend.items():
            self._add(model, self._adapters[name], gamma)
        with torch.inference_mode():
            return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]

    def _add(self, model: nn.Module, path: Path, gamma: float) -> None:
        config = json.loads((path / "adapter_config.json").read_text())
        tensors = load_file(path / "adapter_model.safetensors")
        for name, b in tensors.items():
            if not name.endswith(".lora_B.weight"):
                continue
            stem = name.removesuffix(".lora_B.weight")
            where = stem.removeprefix("base_model.model.")
            a = tensors[f"{stem}.lora_A.weight"]
            scale = config["lora_alpha"] / a.shape[0]
            if config["use_rslora"]:
                scale = config["lora_alpha"] / math.sqrt(a.shape[0])
            linear, pristine = model.get_submodule(where), self._base.get_submodule(where)
            assert isinstance(linear, nn.Linear)
            assert isinstance(pristine, nn.Linear)
            changed = pristine.weight + scale * (b.double() @ a.double())
            magnitude = tensors.get(f"{stem}.lora_magnitude_vector")
            if magnitude is not None:
                changed *= (magnitude.double() / changed.norm(dim=1))[:, None]
            linear.weight.data += gamma * (changed - pristine.weight).detach()
            bias = tensors.get(f"{stem}.lora_B.bias")
            if bias is not None:
                linear.bias.data += gamma * scale * bias.double()
