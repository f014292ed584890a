"""Unquantised linears on a GPU, the output head among them, a fixed number of rows at a time."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from fader_adapters.kernels.dense import ByRows

if TYPE_CHECKING:
    from fader_adapters.kernels.backend import BaseLinear
    from fader_adapters.kernels.cuda.nf4 import Scratch

ROWS = 64
"""Rows of one product, whatever a step holds: the vendor's GEMM cuts its sums by their number."""


def in_parts(
    x: torch.Tensor, rows: int, product: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The product of x [T, in] → [T, out], always of `rows` rows at a time; zeros fill the last."""
    if not x.shape[0]:
        return product(x)
    padded = F.pad(x, (0, 0, 0, -x.shape[0] % rows))
    parts = [product(part) for part in padded.split(rows)]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole[: x.shape[0]]


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, scratch: "Scratch"
) -> torch.Tensor:
    """x·Wᵀ + b, [..., in] → [..., out]; while a backend leads the steps, by the `way` of its
    scratch, always of ROWS rows at a time."""
    if scratch.way == "rows":
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    y = in_parts(rows, ROWS, lambda part: F.linear(part, weight, bias))
    return y.view(*x.shape[:-1], weight.shape[0])


class FixedRows(ByRows):
    """A DenseLinear whose rows get the same bits in any company while a backend leads the steps."""

    def __init__(self, inner: "BaseLinear", weight: torch.Tensor, scratch: "Scratch") -> None:
        """`weight`: inner's [out, in], not copied."""
        self.inner, self.weight, self.bias = inner, weight, inner.bias
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self._scratch = scratch

    @property
    def plain_dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] → [T, out] in x's dtype."""
        return linear(x, self.weight, self.bias, scratch=self._scratch)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.inner.dense(dtype)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.inner.rows(start, stop)
