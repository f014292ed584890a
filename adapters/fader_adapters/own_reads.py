"""Linears whose weight a model reads by itself instead of calling them. LoRA on those changes
nothing that is computed, in PEFT as here, and NF4 cannot hold them: they stay as they are.

Found by running the model's own code without any values; knows no family.
"""

import dis
import inspect
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import lru_cache
from itertools import pairwise
from types import FunctionType
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from fader_adapters.packed_weight import PackedWeight, WeightRead

Kind = tuple[type[nn.Module], str]
"""Children of one name in modules of one class."""


def read_by_itself(model: PreTrainedModel) -> frozenset[str]:
    """Paths of the plain linears whose weight the model reads, as it is configured now: some
    families read one only where they are not quantised."""
    named = list(_children(model))
    if not any(_mentions(kind, name) for _, (kind, name) in named):
        return frozenset()
    read = _reads(type(model), model.config)
    return frozenset(path for path, kind in named if kind in read)


def _children(model: PreTrainedModel) -> Iterator[tuple[str, Kind]]:
    """Without the output head, which keeps its weight wherever it stands."""
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        for name, child in module.named_children():
            if type(child) is nn.Linear and child is not head:
                yield f"{path}.{name}" if path else name, (type(module), name)


def _mentions(kind: type[nn.Module], name: str) -> bool:
    """Whether a class' code says `.name.weight` anywhere."""
    return (name, "weight") in _read_in_a_row(kind)


@lru_cache
def _read_in_a_row(kind: type[nn.Module]) -> frozenset[tuple[str, str]]:
    """Attributes that are read of one another."""
    found: set[tuple[str, str]] = set()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for value in vars(base).values():
            own = inspect.unwrap(value) if callable(value) else None
            if isinstance(own, FunctionType):
                read = ((i.opname, str(i.argval)) for i in dis.get_instructions(own.__code__))
                found.update(
                    (name, of_it)
                    for (first, name), (second, of_it) in pairwise(read)
                    if first == second == "LOAD_ATTR"
                )
    return frozenset(found)


def _reads(kind: type[PreTrainedModel], config: object) -> set[Kind]:
    """What a forward reads; what comes behind something that needs values is not seen."""
    own: Any = deepcopy(config)
    own._attn_implementation = None
    with torch.device("meta"):
        model = cast(Any, kind)._from_config(own).eval()
    watched = dict(_children(model))
    for path in watched:
        model.set_submodule(path, _Watched(model.get_submodule(path), path))
    read: set[Kind] = set()
    while found := _first_read(lambda: _forward(model)):
        read.add(watched[found])
        for path, child in watched.items():
            if child == watched[found]:
                model.set_submodule(path, cast(_Watched, model.get_submodule(path)).inner)
    return read


def _forward(model: nn.Module) -> None:
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    with torch.inference_mode():
        model(input_ids=ids, use_cache=True)  # without one masks go by positions' values


def _first_read(forward: Callable[[], None]) -> str | None:
    try:
        forward()
    except WeightRead as error:
        return error.path
    except Exception:  # noqa: BLE001 - a model that goes by values, which there are none of
        return None
    return None


class _Watched(nn.Module):
    """Stands where a linear stood, and tells who reads its weight."""

    def __init__(self, inner: nn.Module, path: str) -> None:
        super().__init__()
        assert isinstance(inner, nn.Linear)
        self.inner = inner
        self.weight = PackedWeight(inner.weight.dtype, inner.weight.device, path)
        self.bias = inner.bias
        self.in_features, self.out_features = inner.in_features, inner.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], self.out_features)
