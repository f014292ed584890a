"""Plain weights as a base: unquantised linears and heads, and the table of an embedding."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch.nn import functional as F

BLOCK = 32
"""Rows of a product on a CPU: its libraries sum in another order for another number of rows."""


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, block: int = BLOCK
) -> torch.Tensor:
    """x·Wᵀ + b, [n, in] and [out, in] → [n, out]; on a CPU a row has the same bits in any company.

    Every product there has the same shape, `block` rows, whoever takes part. It is one operator of
    torch's: whoever records a forward sees no loop over rows, which would be another at other n.
    """
    if not x.is_cpu:
        return F.linear(x, weight, bias)
    return torch.ops.fader.linear(x, weight, bias, block)


torch.library.define(
    "fader::linear", "(Tensor x, Tensor weight, Tensor? bias, int block) -> Tensor"
)


@torch.library.impl("fader::linear", "CompositeExplicitAutograd")
def _in_blocks(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, block: int
) -> torch.Tensor:
    y = x.new_empty(x.shape[0], weight.shape[0])
    for rows, out in zip(x.split(block), y.split(block), strict=True):
        some = F.pad(rows, (0, 0, 0, block - rows.shape[0]))
        out.copy_(F.linear(some, weight, bias)[: rows.shape[0]])
    return y


def filled(parts: Iterable[torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    """One weight [out, in] from its rows, some at a time; each part is done with before the next
    is asked for."""
    whole, at = None, 0
    for part in parts:
        whole = part.new_empty(shape) if whole is None else whole
        whole[at : at + len(part)] = part
        at += len(part)
    assert whole is not None
    assert at == len(whole)
    return whole


class ByRows(ABC):
    """Products of some rows of W over those rows in fp32."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> torch.Tensor:
        """W[start:stop] in fp32."""

    def product(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return linear(x.float(), self.rows(start, stop))


class DenseLinear(ByRows):
    """W [out, in] in the model's own dtype; shares the model's storage."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self.out_features, self.in_features = weight.shape

    @property
    def plain_dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.weight[start:stop].float()


class Rows(Protocol):
    """A table that gives rows: int64 indices -> [..., width]."""

    @property
    def dtype(self) -> torch.dtype: ...

    def take(self, index: torch.Tensor) -> torch.Tensor: ...


class ByToken:
    """Stands for the weight of a packed table where a model reads that by itself: weight[i, :]."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __getitem__(self, key: tuple[int, slice]) -> torch.Tensor:
        """[width] of one token. Raises TypeError for anything else."""
        token, columns = key
        if not isinstance(token, int) or columns != slice(None):
            raise TypeError(f"a packed table gives whole rows, not [{token}, {columns}]")
        return self._rows.take(torch.tensor([token]))[0]


class EmbeddingTable(ByRows):
    """A lookup as a base: W [out, in] is the table [tokens, width] transposed, x is one-hot."""

    def __init__(
        self, weight: torch.nn.Parameter, lookup: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self.source: torch.nn.Parameter | Rows = weight
        """The model's own table, wherever its values are by now, or what took its place."""
        self.lookup = lookup
        """What the embedding gives, any scale of its own included: ids [n] → [n, out]. Any thread
        may ask."""
        self.bias: torch.Tensor | None = None
        self.in_features, self.out_features = weight.shape

    @property
    def plain_dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def weight(self) -> "torch.Tensor | ByToken":
        """For a model that reads rows of its table by itself."""
        return self.source if isinstance(self.source, torch.Tensor) else ByToken(self.source)

    @property
    def nbytes(self) -> int:
        return self.source.nbytes if isinstance(self.source, torch.Tensor) else 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self._columns(0, self.out_features)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self._columns(0, self.out_features).T.to(dtype)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self._columns(start, stop).T.float()

    def _columns(self, start: int, stop: int) -> torch.Tensor:
        """[tokens, stop − start], some tokens at a time: a packed table gives whole rows only."""
        if isinstance(self.source, torch.Tensor):
            return self.source.data[:, start:stop]
        every = torch.arange(self.in_features)
        return torch.cat([self.source.take(some)[:, start:stop] for some in every.split(4096)])
