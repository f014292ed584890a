"""Which linears of an NF4 model are plain all the same: as their file has them, or because they are
none for NF4's kernels.

Knows module trees and bitsandbytes' parameters; knows no files.
"""

from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fader_adapters.errors import BaseUnsupported
from fader_adapters.kernels.nf4 import BLOCK, check_width


def settle(model: PreTrainedModel) -> None:
    """Leave as bitsandbytes' linears only those whose NF4 weight is served as it is.

    Plain become those that the file holds plain, whatever its config says of them; the output
    head; and those outside the text decoder whose rows NF4's blocks straddle.
    Raises BaseUnsupported, with the module.
    """
    head = model.get_output_embeddings()
    inside = {id(module) for module in (*model.get_decoder().modules(), head)}
    found = [(p, m) for p, m in model.named_modules() if isinstance(m, Linear4bit)]
    if found and not any(_state(module) for _, module in found):
        raise BaseUnsupported(
            "its config says that it is quantised by bitsandbytes, and its files hold plain "
            "weights; remove quantization_config from config.json, and Fader quantises it"
        )
    for path, module in found:
        weight = module.weight
        if isinstance(weight, Params4bit):
            # each holds the other: without this a weight would outlive its layer until some
            # collection of garbage, and the base would be in memory twice
            cast(Any, weight).module = None
        try:
            if id(module) in inside:
                _check_class(module)
            if _state(module) is None:
                model.set_submodule(path, _unquantised(module))
            elif module is head or (id(module) not in inside and module.in_features % BLOCK):
                model.set_submodule(path, _decoded(module))
            else:
                check_width(module.in_features)
        except BaseUnsupported as error:
            raise BaseUnsupported(f"{path}: {error}") from error


def _state(module: Linear4bit) -> Any:  # noqa: ANN401 - bitsandbytes' QuantState
    return getattr(module.weight, "quant_state", None)


def _check_class(module: Linear4bit) -> None:
    own = getattr(module, "source_cls", nn.Linear)
    if own not in (nn.Linear, Conv1D):
        raise BaseUnsupported(
            f"it is a {own.__name__}, a linear with a forward of its own, which NF4 would replace"
        )


def _unquantised(module: Linear4bit) -> nn.Module:
    """Over the weight that is there, which may be tied to an embedding's."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    if not weight.is_floating_point():
        raise BaseUnsupported(f"it has {weight.dtype} weights and no quantisation state")
    if isinstance(weight, Params4bit):
        weight = nn.Parameter(weight.data, requires_grad=False)
    return _plain(module, weight)


def _decoded(module: Linear4bit) -> nn.Module:
    state = _state(module)
    state.dtype = torch.float32  # code · absmax, before anything is rounded
    values = dequantize_4bit(module.weight.data, state)
    if getattr(module, "source_cls", nn.Linear) is Conv1D:
        values = values.T.contiguous()
    return _plain(module, nn.Parameter(values, requires_grad=False))


def _plain(module: Linear4bit, weight: nn.Parameter) -> nn.Module:
    bias = module.bias if isinstance(module.bias, nn.Parameter) else None
    with torch.device("meta"):
        if getattr(module, "source_cls", nn.Linear) is Conv1D:
            plain = Conv1D(module.out_features, module.in_features)
        else:
            plain = nn.Linear(module.in_features, module.out_features, bias=bias is not None)
    plain.weight = weight
    if bias is not None:
        plain.bias = bias
    return plain.eval()
