"""What a sequence leaves behind in transformers' own cache: keys, values, states of any kind.

Knows cache layers as attributes that hold tensors; knows no model, no request and no step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

SPARE = 64
"""Tokens by which the memory of keys and values grows."""

_CHANGED_IN_PLACE = ("conv_states", "recurrent_states")
"""Attributes whose tensors a forward overwrites; all others are replaced by new tensors."""


class GrowingLayer(DynamicLayer):
    """Keys and values with room behind them, so that a token does not copy those before it."""

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [1, kv_heads, n, d] → those of all tokens so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room: tuple[torch.Tensor, torch.Tensor] | None = None
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < stop:
            self._room = (
                _longer(key_states, self.keys, start, stop),
                _longer(value_states, self.values, start, stop),
            )
        keys, values = self._room
        keys[:, :, start:stop] = key_states
        values[:, :, start:stop] = value_states
        self.keys, self.values = keys[:, :, :stop], values[:, :, :stop]
        return self.keys, self.values


def _longer(new: torch.Tensor, old: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
    length = -(-stop // SPARE) * SPARE
    room = new.new_empty(*new.shape[:-2], length, new.shape[-1])
    if start and old is not None:
        room[:, :, :start] = old
    return room


def new_cache(config: PretrainedConfig) -> Cache:
    """An empty cache for one sequence of a model with this config."""
    cache = DynamicCache(config=config)
    # of the class itself, not of those that are made of it and keep their own kind of memory
    cache.layers = [GrowingLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return cache


Snapshot = list[dict[str, Any]]


def snapshot(cache: Cache) -> Snapshot:
    """What it holds now; forwards that go on with it change nothing of that."""
    return [_kept(_attributes(layer)) for layer in cache.layers]


def restore(cache: Cache, kept: Snapshot) -> None:
    """Make it what it was. A snapshot may be restored any number of times."""
    del cache.layers[len(kept) :]
    for layer, attributes in zip(cache.layers, kept, strict=True):
        mine = _attributes(layer)
        mine.clear()
        mine.update(_kept(attributes))


def _attributes(layer: object) -> dict[str, Any]:
    return cast(dict[str, Any], layer.__dict__)


def _kept(attributes: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in attributes.items():
        copied = dict(value) if isinstance(value, dict) else value
        kept[name] = _cloned(copied) if name in _CHANGED_IN_PLACE else copied
    return kept


def _cloned(value: object) -> object:
    """A tensor, or tensors by number: which it is changed with transformers' releases."""
    if isinstance(value, dict):
        return {i: _cloned(part) for i, part in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value


@dataclass(frozen=True, slots=True)
class StateShape:
    """Bytes of one sequence's cache."""

    per_token: int
    """Of what grows with it."""
    fixed: int
    """Of what does not, as it is and as it was one step ago, and of the room behind the rest."""

    @classmethod
    def between(cls, shorter: Cache, longer: Cache, tokens: int) -> "StateShape":
        """Of two caches whose sequences differ by `tokens` in length."""
        small, large = held(shorter), held(longer)
        growth = (sum(large.values()) - sum(small.values())) // tokens
        fixed = sum(n for name, n in small.items() if large[name] == n)
        return cls(growth, 2 * fixed + SPARE * growth)


NO_STATE = StateShape(per_token=0, fixed=0)


def held(cache: Cache) -> dict[tuple[int, str], int]:
    """Bytes by layer and attribute; of keys and values those of the tokens that are there."""
    return {
        (i, name): sum(tensor.nbytes for tensor in _tensors(value))
        for i, layer in enumerate(cache.layers)
        for name, value in _attributes(layer).items()
        if name != "_room"
    }


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
