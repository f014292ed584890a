"""A base in the dtype it is served in, but for what its family keeps in fp32. Knows no adapters."""

from collections.abc import Collection
from copy import deepcopy
from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Params4bit
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation


def cast_base(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let every parameter that is not NF4, and every buffer, have the dtype that transformers'
    `from_pretrained` would give it in a model of `dtype`: rotary frequencies keep theirs."""
    plan: dict[str, torch.dtype] = cast(Any, model)._get_dtype_plan(dtype)
    pattern, _, names = build_glob_alternation(list(plan))
    for path, parameter in model.named_parameters():
        if not isinstance(parameter, Params4bit) and parameter.is_floating_point():
            found = pattern.search(path) if plan else None
            own = plan[names[found.lastgroup or ""]] if found else dtype
            parameter.data = parameter.data.to(own)
    if model.config.dtype != dtype:
        _cast_buffers(model, dtype)


def _cast_buffers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    twin = _without_values(model, dtype)
    wanted = {path: buffer.dtype for path, buffer in twin.named_buffers()}
    rounded: list[str] = []
    """What no file holds, and was made in fewer bits than are wanted."""
    for path, buffer in model.named_buffers():
        own, kind = buffer.dtype, wanted.get(path, buffer.dtype)
        if buffer.is_floating_point() and kind != own:
            buffer.data = buffer.data.to(kind)
            if kind.itemsize > own.itemsize and not _saved(model, path):
                rounded.append(path)
    for path, made in _made(twin, rounded).items():
        model.get_buffer(path).data.copy_(made)


def _without_values(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the same config on the meta device, in `dtype`."""
    config = deepcopy(model.config)
    config._attn_implementation = None
    with torch.device("meta"):
        return cast(Any, type(model))._from_config(config, dtype=dtype)


def _saved(model: PreTrainedModel, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    return name not in model.get_submodule(parent)._non_persistent_buffers_set


def _made(twin: PreTrainedModel, paths: Collection[str]) -> dict[str, torch.Tensor]:
    """These buffers as the model's own initialisation makes them, of which all else has no
    values."""
    if not paths:
        return {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        empty = torch.empty_like(twin.get_buffer(path), device="cpu")
        setattr(twin.get_submodule(parent), name, empty)
    for module in twin.modules():
        twin._init_weights(module)
    return {path: twin.get_buffer(path) for path in paths}
