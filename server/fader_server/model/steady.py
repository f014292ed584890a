"""Functions of single elements whose bits must not depend on where in a tensor an element stands.

torch computes the end of a tensor by other code than the rest of it, so a token's bits would
depend on how many there are. Inside a `Steady` the native kernels compute what they know.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fader_adapters.kernels.native import Map, Tape, activation
from fader_adapters.kernels.native.checks import FLOATS
from fader_server.errors import ModelUnsupported

KNOWN: dict[Any, Map] = {
    torch.sigmoid: Map.SIGMOID,
    Tensor.sigmoid: Map.SIGMOID,
    F.sigmoid: Map.SIGMOID,
    torch.exp: Map.EXP,
    Tensor.exp: Map.EXP,
    torch.log: Map.LOG,
    Tensor.log: Map.LOG,
    F.softplus: Map.SOFTPLUS,
    F.silu: Map.SILU,
}
UNKNOWN = frozenset(
    {
        *(torch.tanh, Tensor.tanh, F.tanh, torch.erf, Tensor.erf, F.gelu, F.logsigmoid, F.mish),
        *(torch.log1p, Tensor.log1p, torch.log2, Tensor.log2, torch.log10, Tensor.log10),
        *(torch.exp2, Tensor.exp2, torch.expm1, Tensor.expm1, torch.cos, torch.sin, F.elu),
    }
)
"""Such functions that the kernels do not have."""


class Steady(TorchFunctionMode):
    """Of one model. A token is a row of a tensor of at least two dimensions."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape
        self.strict = False
        """Whether a function that is unknown is refused: what runs now is proven for some sizes
        only."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Raises ModelUnsupported where it is strict."""
        kind = KNOWN.get(func)
        plain = len(args) == 1 and not any((kwargs or {}).values())
        if kind is not None and plain and _rows(args[0]):
            x: Tensor = args[0]
            return activation(x.reshape(-1, x.shape[-1]), kind, tape=self._tape).view(x.shape)
        if self.strict and (kind is not None or func in UNKNOWN) and args[0].dim() > 1:
            raise ModelUnsupported(f"{getattr(func, '__name__', func)} is not the same at any size")
        return func(*args, **(kwargs or {}))


def _rows(x: Tensor) -> bool:
    return x.dim() > 1 and x.dtype in FLOATS and x.device.type == "cpu" and x.numel() > 0
