"""Base linears by bitsandbytes' own kernels, on machines that Fader's do not know."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from fader_adapters.kernels.cuda.dense import in_parts
from fader_adapters.kernels.dense import ByRows
from fader_adapters.kernels.nf4 import BLOCK, Nf4Weight, dense, stack

if TYPE_CHECKING:
    from fader_adapters.kernels.cuda.nf4 import Scratch, Way


ROWS: "Mapping[Way, int | None]" = {"rows": None, "fused": 4, "pieces": 256}
"""Rows of one call by way. Four are the most that bitsandbytes multiplies without decoding the
whole weight first, whatever its shape, on the machines whose choices are known (H100, A100)."""


class BitsandbytesLinear(ByRows):
    """W in bitsandbytes' own bytes and its own choice of kernels, on machines ours do not know.

    bitsandbytes changes kernels with the number of rows, and a row's bits with them: while a
    backend leads the steps, by the `way` of its scratch, it is given one number of rows always.
    """

    def __init__(
        self,
        weights: Sequence[Nf4Weight],
        bias: torch.Tensor | None,
        scratch: "Scratch | None" = None,
    ) -> None:
        """scratch  of the backend; None: all rows at once, always"""
        self._weight = stack(weights)
        self._scratch = scratch
        self.bias = bias
        self.out_features = self._weight.out_features
        self.in_features = self._weight.in_features

    @property
    def plain_dtype(self) -> None:
        return None

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] → [T, out] in x's dtype."""
        rows = None if self._scratch is None else ROWS[self._scratch.way]
        return self._product(x) if rows is None else in_parts(x, rows, self._product)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        import bitsandbytes  # noqa: F401 - registers its operators

        if not x.shape[0]:
            return x.new_empty(0, self.out_features)
        return torch.ops.bitsandbytes.gemm_4bit.default(
            x,
            self._weight.packed,
            [self.out_features, self.in_features],
            self._weight.absmax,
            BLOCK,
            "nf4",
            None if self.bias is None else self.bias.to(x.dtype),
        )

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """W [out, in]."""
        return dense(self._weight, dtype)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """W[start:stop] in fp32, on the device."""
        return dense(self._weight.rows(start, stop), torch.float32)
