"""Brings a base that was read on the CPU to the pretended device, as if it had been read there.

bitsandbytes' own kernels do not run there; what they leave behind is the same bytes.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Params4bit
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from fader_adapters.kernels.cuda import nf4
from fader_server.model import loader
from tests.support.pretend_cuda.device import PretendDevice

CPU = torch.device("cpu")


class Params4bitThere(Params4bit):
    """bitsandbytes' parameter; its bytes and its state are on the device."""

    there: torch.Tensor

    @property
    def data(self) -> torch.Tensor:  # pyright: ignore
        return self.there


def bring(model: PreTrainedModel, device: PretendDevice) -> PreTrainedModel:
    """Every parameter and buffer, in place; tied ones stay tied."""
    moved: dict[int, Any] = {}

    def move(found: torch.Tensor) -> Any:
        if id(found) not in moved:
            moved[id(found)] = _moved(found, device.wrap)
        return moved[id(found)]

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, found in table.items():
                if found is not None:
                    table[name] = move(found)
    return model


def _moved(found: torch.Tensor, wrap: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    if isinstance(found, Params4bit):
        return _packed(found, wrap)
    there = wrap(found.detach().clone())
    if isinstance(found, nn.Parameter):
        return nn.Parameter(there, requires_grad=found.requires_grad)
    return there


def _packed(found: Params4bit, wrap: Callable[[torch.Tensor], torch.Tensor]) -> Params4bitThere:
    made: Any = torch.Tensor._make_subclass(Params4bitThere, torch.empty(0, dtype=torch.uint8))
    made.there = wrap(found.data.detach().clone())
    made.quant_state = _state(found.quant_state, wrap)
    for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage"):
        setattr(made, name, getattr(found, name))
    made.bnb_quantized, made.module = True, None
    return made


def _state(state: Any, wrap: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if state is None:
        return None
    made = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, torch.Tensor):
            setattr(made, name, wrap(value.detach().clone()))
    made.state2 = _state(state.state2, wrap)
    return made


def read_bases(device: PretendDevice, patch: pytest.MonkeyPatch) -> None:
    """From now on the loader reads on the CPU and brings the base over; the fused kernel computes
    in fp32, all that Triton's interpreter has."""
    read = loader.read_nf4

    def read_nf4(
        source: str,
        config: PretrainedConfig,
        *,
        device: torch.device,
        **given: Any,
    ) -> PreTrainedModel:
        if device.type == "cpu":
            return read(source, config, device=CPU, **given)
        with owner.plainly(), pytest.MonkeyPatch.context() as absent:
            absent.setattr(torch.cuda, "is_available", lambda: False)
            model = read(source, config, device=CPU, **given)
        return bring(model, owner)

    owner = device
    patch.setattr(loader, "read_nf4", read_nf4)
    patch.setattr(nf4, "interpreted", lambda x: True)
