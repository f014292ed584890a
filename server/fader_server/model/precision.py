"""A base in the dtype it is served in, but for what its family keeps in fp32. Knows no adapters."""

from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Params4bit
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from fader_adapters.embed_scale import round_embed_scales


def cast_base(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let every parameter that is not NF4 have the dtype that transformers' `from_pretrained` would
    give it in a model of `dtype`; buffers, such as rotary frequencies, keep theirs."""
    plan: dict[str, torch.dtype] = cast(Any, model)._get_dtype_plan(dtype)
    pattern, _, names = build_glob_alternation(list(plan))
    for path, parameter in model.named_parameters():
        if not isinstance(parameter, Params4bit) and parameter.is_floating_point():
            found = pattern.search(path) if plan else None
            own = plan[names[found.lastgroup or ""]] if found else dtype
            parameter.data = parameter.data.to(own)
    round_embed_scales(model, dtype)
