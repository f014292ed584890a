"""Products of a weight with a step's tokens, whose bits must not depend on how many there are.

Some layers multiply by a linear's weight by themselves, tokens as columns: W·xᵀ.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fader_adapters.kernels.dense import linear
from fader_server.model.steady import Steady

MATMULS = (torch.matmul, torch.Tensor.matmul)


class SteadyProducts(Steady):
    """Nor do bits of elements."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func in MATMULS and not kwargs and _by_column(*args):
            weight, x = args
            return linear(x[0].t(), weight).t().unsqueeze(0)
        return super().__torch_function__(func, types, args, kwargs)


def _by_column(weight: Tensor, x: Tensor) -> bool:
    """[out, in] and [1, in, tokens]"""
    return weight.dim() == 2 and x.dim() == 3 and x.shape[0] == 1
