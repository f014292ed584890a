"""A model as the function of one sequence's next tokens and transformers' own cache.

Knows a model's forward by its signature; knows no step and no other sequence.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from fader_server.errors import ModelUnsupported
from fader_server.model.states import new_cache

_CACHE = ("cache", "past_key_values", "cache_params")
"""What models call the cache they are given: all of them the first, from transformers 5.24 on."""


def cache_name(kind: type[nn.Module]) -> str | None:
    """What a module's forward calls the cache it is given; None: it takes none."""
    takes = inspect.signature(kind.forward).parameters
    return next((name for name in _CACHE if name in takes), None)


def attend_as_built(model: PreTrainedModel) -> None:
    """The model attends by transformers' own functions, the quick one where it has it."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")


class SoloModel:
    """A model as the function of one sequence's next tokens and its cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ModelUnsupported where its forward takes no cache."""
        self._model = model
        takes = inspect.signature(type(model).forward).parameters
        name = cache_name(type(model))
        if name is None:
            raise ModelUnsupported(f"{type(model).__name__} keeps no cache of transformers' kind")
        self._cache = name
        self._positions = "position_ids" in takes
        self._keep = "logits_to_keep" in takes

    def new_cache(self) -> Cache:
        """An empty one."""
        return new_cache(self._model.config)

    def logits(
        self, tokens: list[int], start: int, cache: Cache, wanted: list[int]
    ) -> torch.Tensor:
        """[len(wanted), vocab]: after some of the tokens at `start` and behind, by their places.

        The cache holds those before and takes these in.
        """
        device = self._model.device
        given: dict[str, Any] = {self._cache: cache}
        if self._positions:
            stop = start + len(tokens)
            given["position_ids"] = torch.arange(start, stop, device=device).unsqueeze(0)
        kept = wanted or [len(tokens) - 1]  # some models cannot keep nothing
        index = torch.tensor(kept, device=device)
        if self._keep:
            given["logits_to_keep"] = index
        ids = torch.tensor([tokens], device=device)
        logits = self._model(input_ids=ids, use_cache=True, **given).logits[0]
        if not self._keep or len(logits) != len(kept):  # all of them, or as it pleases
            logits = logits[index]
        return logits[: len(wanted)]
