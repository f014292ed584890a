"""What adapters do, as dense weights in fp64, read from their files by hand: no PEFT, no Fader."""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())  # adapted apart from a tied table
        for name, gamma in blend.items():
            self._add(model, self._adapters[name], gamma)
        with torch.inference_mode():
            return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]

    def _add(self, model: nn.Module, path: Path, gamma: float) -> None:
        config = json.loads((path / "adapter_config.json").read_text())
        tensors = load_file(path / "adapter_model.safetensors")
        for name, b in tensors.items():
            if name.endswith(".weight") and "lora" not in name and "base_layer" not in name:
                # trained whole
                where = name.removesuffix(".weight").removeprefix("base_model.model.")
                own, there = (m.get_submodule(where).weight.data for m in (self._base, model))
                there += gamma * (b.double() - own)
            for end in (".lora_B.weight", ".lora_embedding_B"):
                if name.endswith(end):
                    stem = name.removesuffix(end)
                    a = tensors[stem + end.replace("B", "A")]
                    self._add_one(model, stem, a.double(), b.double(), tensors, config, gamma)

    def _add_one(
        self,
        model: nn.Module,
        stem: str,
        a: torch.Tensor,
        b: torch.Tensor,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        gamma: float,
    ) -> None:
        where = stem.removeprefix("base_model.model.")
        module, pristine = model.get_submodule(where), self._base.get_submodule(where)
        weight, target = pristine.weight.data, module.weight.data
        if isinstance(pristine, nn.Embedding):
            weight, target = weight.T, target.T
        rank = a.shape[0]
        scale = config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)
        changed = weight + scale * (b @ a)
        magnitude = tensors.get(f"{stem}.lora_magnitude_vector")
        if magnitude is not None:
            changed *= (magnitude.double() / changed.norm(dim=1))[:, None]
        target += gamma * (changed - weight)
        bias = tensors.get(f"{stem}.lora_B.bias")
        if bias is not None:
            module.bias.data += gamma * scale * bias.double()
