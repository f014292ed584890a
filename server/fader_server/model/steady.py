"""Functions of single elements whose bits must not depend on where in a tensor an element stands.

torch computes the end of a tensor, and of each thread's part of one, by other code than the rest,
so a token's bits would depend on how many there are. Inside a `Steady` they do not: the native
kernels compute what they know; what they do not is computed in fp64 and rounded.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fader_adapters.kernels.native import Map, Tape, activation
from fader_adapters.kernels.native.checks import FLOATS
from fader_server.model.callers import Heard

NATIVE: dict[Any, Map] = {
    torch.sigmoid: Map.SIGMOID,
    Tensor.sigmoid: Map.SIGMOID,
    torch.exp: Map.EXP,
    Tensor.exp: Map.EXP,
    torch.log: Map.LOG,
    Tensor.log: Map.LOG,
    torch.tanh: Map.TANH,
    Tensor.tanh: Map.TANH,
    F.softplus: Map.SOFTPLUS,
    F.silu: Map.SILU,
}
GELUS = {"none": Map.GELU, "tanh": Map.GELU_TANH}
UNSTEADY: dict[Any, str] = {
    torch.sigmoid: "sigmoid",
    Tensor.sigmoid: "sigmoid",
    F.softplus: "softplus",
    F.silu: "silu",
    F.gelu: "gelu",
    F.mish: "mish",
    F.elu: "elu",
    F.glu: "glu",
    torch.exp2: "exp2",
    Tensor.exp2: "exp2",
    torch.rsqrt: "rsqrt",
    Tensor.rsqrt: "rsqrt",
}
"""The functions for which torch has two codes, and the operators that they call. Not so exp, log,
tanh, erf, cos and others: they are the same anywhere."""
_OPERATORS = frozenset(UNSTEADY.values())


def unsteady(heard: Heard) -> bool:
    """Whether the bits of what this call gives depend on an element's place."""
    exact = heard.name == "rsqrt" and heard.dtype == torch.float32
    return heard.name in _OPERATORS and heard.dtype in FLOATS and not exact


class Steady(TorchFunctionMode):
    """Of one model. A token is a row of a tensor of at least two dimensions."""

    def __init__(self, tape: Tape | None) -> None:
        """tape: of the native kernels; None: there are none."""
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        given = kwargs or {}
        known = (func in NATIVE or func in UNSTEADY) and bool(args)
        if known and _rows(args[0]) and not given.get("inplace"):
            x: Tensor = args[0]
            kind = None if self._tape is None else _kind(func, args, given)
            if kind is not None:
                return activation(x.reshape(-1, x.shape[-1]), kind, tape=self._tape).view(x.shape)
            if func in UNSTEADY and unsteady(Heard(UNSTEADY[func], x.dtype)):
                func = _gelu if func is F.gelu else func
                return func(x.double(), *args[1:], **given).to(x.dtype)
        return func(*args, **given)


def within(mode: TorchFunctionMode, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward, run inside of the mode."""

    def run(*args: object, **kwargs: object) -> object:
        with mode:
            return forward(*args, **kwargs)

    return run


def _kind(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Map | None:
    if len(args) != 1:
        return None
    if func is F.gelu:
        return GELUS.get(kwargs.get("approximate", "none"))
    return None if any(kwargs.values()) else NATIVE.get(func)


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """torch's own loses digits where x is below 0, in fp64, too."""
    if approximate == "tanh":
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
    return x * torch.special.erfc(x * -math.sqrt(0.5)) / 2


def _rows(x: Tensor) -> bool:
    return x.dim() > 1 and x.dtype in FLOATS and x.device.type == "cpu" and x.numel() > 0
