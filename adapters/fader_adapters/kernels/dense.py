"""Plain weights as a base: unquantised linears and heads, and the table of an embedding."""

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


class EmbeddingTable:
    """A lookup as a base: W [out, in] is the table [tokens, width] transposed, x is one-hot."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        self._weight = weight
        self.bias: torch.Tensor | None = None
        self.in_features, self.out_features = weight.shape

    @property
    def table(self) -> torch.Tensor:
        """Wherever the parameter's values are by now."""
        return self._weight.data

    @property
    def nbytes(self) -> int:
        return self.table.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.table.T)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.table.T.to(dtype)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.table[:, start:stop].T.float()
