"""Replaces activations by the native kernel where it gives what the model's own give."""

import torch
from torch import nn

from fader_adapters.kernels.native import Map, Tape, activation
from fader_server.model.norm import TOLERANCE, replace_modules

KINDS = (Map.SILU, Map.GELU, Map.GELU_TANH, Map.TANH)


class NativeActivation(nn.Module):
    """Stands where a model's activation stood: x [..., k] → [..., k]."""

    def __init__(self, kind: Map, tape: Tape) -> None:
        super().__init__()
        self._kind = kind
        self._tape = tape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return activation(rows, self._kind, tape=self._tape).view(x.shape)


def replace_activations(model: nn.Module, *, dtype: torch.dtype, tape: Tape) -> int:
    """Replace every activation that one of the kernel's formulas reproduces; returns how many.

    As with norms, the module's own output on a random input decides, not its name.
    """

    def stand_in(module: nn.Module) -> NativeActivation | None:
        kind = _kind(module, dtype)
        return None if kind is None else NativeActivation(kind, tape)

    return replace_modules(model, stand_in)


def _kind(module: nn.Module, dtype: torch.dtype) -> Map | None:
    source = type(module).__module__
    known = source.startswith(("torch.nn.modules.activation", "transformers.activations"))
    if not known or dtype not in TOLERANCE or any(True for _ in module.parameters()):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 64, generator=generator).mul_(4.0).to(dtype)
    with torch.inference_mode():
        expected = module(x)
        if expected.shape != x.shape:  # a gate that halves its input
            return None
        for kind in KINDS:
            if torch.allclose(activation(x, kind), expected, rtol=TOLERANCE[dtype], atol=1e-6):
                return kind
    return None
