"""Activated LoRA by PEFT: blends of several, each from its own place in the prompt on."""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant, calculate_alora_offsets

from tests.server.parity.test_families import difference
from tests.support.oracle import Oracle
from tests.support.world import Answer, Ask


def activate(adapter: Path, target: Path, tokens: Sequence[int]) -> Path:
    """The same adapter, activated by these tokens."""
    shutil.copytree(adapter, target)
    path = target / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"alora_invocation_tokens": list(tokens)}))
    return target


@dataclass
class _Asked:
    """What an oracle says of one prompt and what comes after it."""

    oracle: "ActivatedOracle"
    prompt: Sequence[int]

    def logits(self, tokens: Sequence[int], blend: Mapping[str, float]) -> torch.Tensor:
        return self.oracle.logits_after(self.prompt, tokens, blend)


class ActivatedOracle(Oracle):
    """PEFT's own layers and its own search for the invocation; only which of several adapters
    begins where is told to each apart, for PEFT knows one place for all."""

    def logits_after(
        self, prompt: Sequence[int], tokens: Sequence[int], blend: Mapping[str, float]
    ) -> torch.Tensor:
        """[len(tokens), vocab] in fp32; `tokens` begin with the prompt, whole or cut."""
        model = self._model
        assert isinstance(model, PeftModel)
        if not blend:
            return self.logits(tokens, {})
        offsets = {name: [self._offset(name, prompt, len(tokens))] for name in blend}
        with self._set(blend), _each_its_own(), torch.inference_mode():
            ids = torch.tensor([list(tokens)])
            given: Any = {"alora_offsets": offsets}
            return model(input_ids=ids, use_cache=False, **given).logits[0].float()

    def generate(self, prompt: Sequence[int], count: int, name: str) -> list[int]:
        """PEFT's own greedy answer under one adapter, with a cache of keys and values."""
        model = self._model
        assert isinstance(model, PeftModel)
        model.set_adapter(name)
        ids = torch.tensor([list(prompt)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
            )
        return made[0, len(prompt) :].tolist()

    def check(self, asks: Sequence[Ask], answers: Sequence[Answer], bound: float) -> None:
        """Every logprob of prompts and answers."""
        for ask, answer in zip(asks, answers, strict=True):
            assert answer.error is None
            assert self.difference(ask, answer, bound) <= bound, (ask.blend, ask.prompt)

    def difference(self, ask: Ask, answer: Answer, bound: float) -> float:
        return difference(_Asked(self, ask.prompt), ask, answer, bound)  # type: ignore[arg-type]

    def _offset(self, name: str, prompt: Sequence[int], length: int) -> int | None:
        """Counted from the last of `length` tokens, as PEFT does."""
        model: Any = self._model
        if not model.peft_config[name].alora_invocation_tokens:
            return None
        ids = torch.tensor([list(prompt)])
        (offset,) = calculate_alora_offsets(model.peft_config, name, ids)
        return None if offset is None else offset + length - len(prompt)

    @contextmanager
    def _set(self, blend: Mapping[str, float]) -> Iterator[None]:
        """The adapters of a blend, all at once, each with its weight."""
        model: Any = self._model
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        before = [dict(layer.scaling) for layer in layers]
        model.base_model.set_adapter(list(blend))
        for layer in layers:
            for name in blend.keys() & layer.scaling.keys():
                layer.scaling[name] *= blend[name]
        try:
            yield
        finally:
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling.update(scaling)


@contextmanager
def _each_its_own() -> Iterator[None]:
    """PEFT's variant, given places by adapter, looks at its own."""
    forward = ALoraLinearVariant.forward

    def own(module: Any, active_adapter: str, x: Any, result: Any, **kwargs: Any) -> Any:
        kwargs["alora_offsets"] = kwargs["alora_offsets"][active_adapter]
        return forward(module, active_adapter, x, result, **kwargs)

    ALoraLinearVariant.forward = staticmethod(own)
    try:
        yield
    finally:
        ALoraLinearVariant.forward = staticmethod(forward)
