"""Base linears by bitsandbytes' own kernels, on machines that Fader's do not know."""

from collections.abc import Sequence

import torch

from fader_adapters.kernels.dense import ByRows
from fader_adapters.kernels.nf4 import BLOCK, Nf4Weight, dense, stack


class BitsandbytesLinear(ByRows):
    """W in bitsandbytes' own bytes and its own choice of kernels, on machines ours do not know.

    A row's bits depend on the number of rows here: bitsandbytes changes kernels with it.
    """

    def __init__(self, weights: Sequence[Nf4Weight], bias: torch.Tensor | None) -> None:
        self._weight = stack(weights)
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
