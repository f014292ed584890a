"""A stack of experts in bitsandbytes' NF4. Knows weights; no routers, no adapters."""

from collections.abc import Iterable

import torch

from fader_adapters.kernels.dense import ByRows, linear
from fader_adapters.kernels.nf4 import Nf4Weight, dense, filled
from fader_adapters.kernels.routing import Routing
from fader_adapters.kernels.stack_weights import BLOCK

Shape = tuple[int, int, int]
"""(experts, out, in)"""


class Nf4Stack(ByRows):
    """Several linears of one shape as one NF4 matrix [experts · out, in], decoded expert by expert
    at every call."""

    plain_dtype = None

    def __init__(self, weight: Nf4Weight, experts: int, bias: torch.Tensor | None) -> None:
        """bias [experts, out]"""
        self.weight = weight
        self.experts = experts
        self.bias = bias

    @staticmethod
    def of(rows: Iterable[Nf4Weight], shape: Shape, bias: torch.Tensor | None) -> "Nf4Stack":
        """A stack of its rows, some at a time; each part is done with before the next is asked
        for."""
        experts, out, width = shape
        return Nf4Stack(filled(rows, (experts * out, width)), experts, bias)

    @property
    def shape(self) -> Shape:
        out = self.weight.out_features // self.experts
        return self.experts, out, self.weight.in_features

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return self.weight.nbytes

    @property
    def resident(self) -> tuple[torch.Tensor, ...]:
        return ()

    def matrix(self, expert: int) -> Nf4Weight:
        """One expert's W [out, in], a view."""
        _, out, _ = self.shape
        return self.weight.rows(expert * out, (expert + 1) * out)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return dense(self.weight.rows(start, stop), torch.float32)

    def grouped(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Each pair's product with its expert's weight, x [pairs, in] → [pairs, out], bias added.

        A pair's bits depend on the pair alone.
        """
        y, begin = x.new_empty(x.shape[0], self.shape[1]), 0
        # by int: a value that is read tells whoever records a forward that it is not repeatable
        for expert, end in enumerate(map(int, routing.ends)):
            if begin < end:
                weight = dense(self.matrix(expert), x.dtype)
                y[begin:end] = linear(x[begin:end], weight, block=BLOCK)
            begin = end
        return y if self.bias is None else y.add_(self.bias.data[routing.expert].to(y.dtype))
