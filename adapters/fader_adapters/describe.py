"""What of a transformers model adapters may target: its linears, its head, its embedding.

Knows module trees and configs; looks at no weight.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import lru_cache
from math import prod
from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from fader_adapters.architecture import auto_class
from fader_adapters.embed_scale import embed_scale
from fader_adapters.errors import BaseUnsupported
from fader_adapters.kernels.nf4 import BLOCK
from fader_adapters.own_reads import read_by_itself
from fader_adapters.spec import BaseSpec, Digest, LinearSpec, layer_of
from fader_adapters.stacks import experts, routers, stack_names, stack_of

_PACKS_IN_ORDER = frozenset({"phi3", "phi4_multimodal", "glm", "glm4"})
"""Model types whose qkv_proj and gate_up_proj hold their parts one after the other."""

_ODD_SHARE = 0.1
"""Of a text decoder's weights so much may stay as they are: NF4 cannot hold them."""


def describe(model: PreTrainedModel, *, name: str = "") -> BaseSpec:
    """The linears that adapters may target, then mixtures' experts and routers, then the embedding
    and the head, where they are plain.

    Raises BaseUnsupported when there is no linear.
    """
    read = read_by_itself(model)
    specs = [_linear(p, module, model) for p, module in _every_linear(model) if p not in read]
    if not specs:
        raise BaseUnsupported(_no_linear(model))
    for path, module in experts(model):
        specs += [stack_of(module, name, path, layer_of(path)) for name in stack_names(module)]
    for path, weight in routers(model):
        out, width = weight.shape
        specs.append(LinearSpec(path, width, out, layer_of(path), role="router"))
    embedding, head = model.get_input_embeddings(), plain_head(model)
    for path, module in model.named_modules():
        if module is embedding and isinstance(module, nn.Embedding):
            width, out = module.num_embeddings, module.embedding_dim
            scale = embed_scale(module)
            specs.append(
                LinearSpec(path, width, out, None, True, role="embedding", multiplier=scale)
            )
        elif head is not None and module is head:
            specs.append(LinearSpec(path, head.in_features, head.out_features, None, role="head"))
    state = hashlib.sha256(model.config.model_type.encode())
    for spec in specs:
        state.update(f"\0{spec.path}\0{spec.in_features}\0{spec.out_features}".encode())
    tied = head is not None and head.weight is getattr(embedding, "weight", None)
    digest = Digest(state.hexdigest())
    return BaseSpec(tuple(specs), digest, model.config.model_type, name, tied, read=read)


def linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Every linear but the output head, in model order: what computes x·Wᵀ + b and nothing else, as
    a class derived from it may do. Nor those whose weight the model reads by itself."""
    read = read_by_itself(model)
    for path, module in _every_linear(model):
        if path not in read:
            yield path, module


def _every_linear(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    head, plain = model.get_output_embeddings(), (nn.Linear, Conv1D, *_four_bits())
    for path, module in model.named_modules():
        if module is not head and (type(module) in plain or _as_linear(type(module))):
            yield path, module


def make_plain(model: PreTrainedModel) -> None:
    """Let linears of another class that compute as nn.Linear does be of that class, in place: a
    quantiser takes no other."""
    for _, module in linears(model):
        if _as_linear(type(module)):
            module.__class__ = nn.Linear


def _as_linear(kind: type[nn.Module]) -> bool:
    """Whether a class of transformers' that is derived from nn.Linear computes what that does."""
    own = kind.__module__.startswith("transformers.") and issubclass(kind, nn.Linear)
    return own and _gives_the_same(kind, kind.forward)


@lru_cache
def _gives_the_same(kind: type[nn.Module], forward: Callable[..., Any]) -> bool:
    """The class beside nn.Linear on a few numbers. `forward`: its own, part of what is known."""
    x = torch.linspace(-2, 3, 48, device="cpu", dtype=torch.float32).view(2, 3, 8)
    for bias in (False, True):
        plain = nn.Linear(8, 4, bias=bias, device="cpu", dtype=torch.float32)
        with torch.no_grad():
            wanted = plain(x)
            plain.__class__ = cast("type[nn.Linear]", kind)
            try:
                given = forward(plain, x)
            except Exception:  # noqa: BLE001 - it wants what nn.Linear does not have
                return False
        if not isinstance(given, torch.Tensor) or given.shape != wanted.shape:
            return False
        if not torch.allclose(given, wanted, rtol=1e-5, atol=1e-5):
            return False
    return True


def _no_linear(model: PreTrainedModel) -> str:
    told = f"{type(model).__name__} has no linear that an adapter could target"
    head, of_its_own = model.get_output_embeddings(), set[str]()
    for module in model.modules():
        if module is not head and isinstance(module, nn.Linear):
            of_its_own.add(type(module).__name__)
    named = ", ".join(sorted(of_its_own))
    return f"{told}; what it has ({named}) computes more than x·Wᵀ + b" if named else told


def _four_bits() -> tuple[type[nn.Module], ...]:
    """bitsandbytes' linear; a model without it may be described where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return ()
    from bitsandbytes.nn.modules import Linear4bit

    return (Linear4bit,)


def kept_plain(model: PreTrainedModel) -> list[str] | None:
    """What bitsandbytes' quantiser is to leave alone (llm_int8_skip_modules), None: its own choice.

    Beside that choice the linears whose rows NF4's blocks would straddle, and those whose weight
    the model reads by itself: in towers for pictures or sound, and small ones of the text decoder,
    which hold at most `_ODD_SHARE` of its weights. Where they hold more, the base is not one for
    NF4, and they are not kept.
    """
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    every, read = list(_every_linear(model)), read_by_itself(model)
    odd = [(p, module) for p, module in every if p in read or _shape(module)[0] % BLOCK]
    weights = sum(prod(_shape(module)) for _, module in every if id(module) in inside)
    small = sum(prod(_shape(module)) for _, module in odd if id(module) in inside)
    if small > _ODD_SHARE * weights:
        odd = [(path, module) for path, module in odd if id(module) not in inside]
    return [*get_keys_to_not_convert(model), *(path for path, _ in odd)] if odd else None


def kept_plain_of(config: PretrainedConfig) -> list[str] | None:
    """`kept_plain` of the model that would be made of a config, without any weight.

    Raises BaseUnsupported.
    """
    config = deepcopy(config)
    to_be_quantised(config)
    with torch.device("meta"):
        return kept_plain(auto_class(config).from_config(config))


def to_be_quantised(config: PretrainedConfig) -> None:
    """Let a config say, as transformers' does of a quantised model, what some families go by."""
    setattr(config, "_is_quantized", True)  # noqa: B010 - transformers sets it on any config


def activation_dtype(model: PreTrainedModel) -> torch.dtype:
    """What its embeddings give; some of its parameters may be of another."""
    table = getattr(model.get_input_embeddings(), "weight", None)
    return table.dtype if isinstance(table, torch.Tensor) else model.dtype


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The output head, unless it is quantised or something else than a linear."""
    head = model.get_output_embeddings()
    return head if type(head) is nn.Linear else None


def _linear(path: str, module: nn.Module, model: PreTrainedModel) -> LinearSpec:
    conv1d = isinstance(module, Conv1D) or getattr(module, "source_cls", None) is Conv1D
    width, out = _shape(module)
    parts = _parts(path, out, model)
    return LinearSpec(path, width, out, layer_of(path), conv1d, parts=parts)


def _shape(module: nn.Module) -> tuple[int, int]:
    """(in, out)"""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def _parts(path: str, out: int, model: PreTrainedModel) -> tuple[int, ...]:
    """Rows of the linears packed into the one of this name, () where that is not known."""
    parent, _, name = path.rpartition(".")
    if name == "in_proj_qkv":  # of a delta rule, which knows how wide its keys and values are
        rule = model.get_submodule(parent)
        key, value = getattr(rule, "key_dim", 0), getattr(rule, "value_dim", 0)
        return (key, key, value) if 2 * key + value == out else ()
    config = model.config.get_text_config(decoder=True)
    if _PACKS_IN_ORDER.isdisjoint((model.config.model_type, config.model_type)):
        return ()
    if name == "gate_up_proj":
        return (out // 2, out // 2)
    if name != "qkv_proj":
        return ()
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    width = out // (heads + 2 * shared)
    parts = (heads * width, shared * width, shared * width)
    return parts if sum(parts) == out else ()
