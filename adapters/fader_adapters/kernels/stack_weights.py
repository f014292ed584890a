"""The weights of a stack of experts, in the model's own storage. Knows no routers, no adapters."""

from collections.abc import Iterable

import torch
from torch.nn import functional as F

from fader_adapters.kernels.dense import ByRows, filled, linear
from fader_adapters.kernels.routing import Routing

BLOCK = 8
"""Rows of an fp32 product on a CPU: few tokens of a step meet in one expert."""


def filled_stack(
    matrices: Iterable[torch.Tensor], shape: tuple[int, int, int], bias: torch.Tensor | None
) -> "StackWeight":
    """A stack (experts, out, in) of its matrices, each done with before the next is asked for."""
    experts, out, width = shape
    return StackWeight(filled(matrices, (experts * out, width)).view(shape), bias)


class StackWeight(ByRows):
    """Several linears of one shape, also as one matrix [experts · out, in]."""

    def __init__(
        self, source: torch.Tensor, bias: torch.Tensor | None = None, *, transposed: bool = False
    ) -> None:
        """source: [experts, out, in], or transposed [experts, in, out]; [out, in] of one; its
        storage is looked up at every call. bias [experts, out]."""
        self.source = source
        self.bias = bias
        self.transposed = transposed

    @property
    def values(self) -> torch.Tensor:
        """[experts, out, in], or [out, in]."""
        return self.source.data.mT if self.transposed else self.source.data

    @property
    def plain_dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return self.source.nbytes

    @property
    def resident(self) -> tuple[torch.Tensor, ...]:
        return ()

    def rows(self, start: int, stop: int) -> torch.Tensor:
        values, parts = self.values, []
        stack = values if values.dim() == 3 else values[None]
        out = stack.shape[1]
        for expert in range(start // out, -(-stop // out)):
            first = expert * out
            parts.append(stack[expert, max(start - first, 0) : min(stop - first, out)])
        return torch.cat(parts).float()

    def grouped(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Each pair's product with its expert's weight, x [pairs, in] → [pairs, out], bias added.

        A pair's bits depend on the pair alone.
        """
        weight = self.values
        if x.dtype == torch.float32 and x.is_cpu:  # products of one shape
            y, begin = x.new_empty(x.shape[0], weight.shape[1]), 0
            # by int: a value that is read tells whoever records a forward that it is not repeatable
            for expert, end in enumerate(map(int, routing.ends)):
                if begin < end:
                    y[begin:end] = linear(x[begin:end], weight[expert], block=BLOCK)
                begin = end
        else:
            y = F.grouped_mm(x.to(weight.dtype), weight.mT, offs=routing.ends)
        return y if self.bias is None else y.add_(self.bias.data[routing.expert])
