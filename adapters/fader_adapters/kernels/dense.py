"""A plain, unquantised linear as a base: what `attach` finds in an ordinary model."""

import torch
from torch.nn import functional as F


class DenseLinear:
    """W [out, in] in the model's own dtype; shares the model's storage."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self.out_features, self.in_features = weight.shape

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.weight[start:stop].float()
