"""Sites, embeddings and stacks of experts of a base, bound to their kernels on a GPU. Knows no
weights' layout, chooses nothing."""

from typing import TYPE_CHECKING

import torch

from fader_adapters.kernels.cuda import nf4
from fader_adapters.kernels.cuda.beside import Beside
from fader_adapters.kernels.cuda.expert_calls import stack_delta
from fader_adapters.kernels.cuda.lora import DeltaSite, LoraStep
from fader_adapters.kernels.cuda.lora_launch import (
    add,
    delta,
    join,
    joined,
    lookup_delta,
    shrink,
)
from fader_adapters.kernels.cuda.lora_step import StackSite
from fader_adapters.kernels.routing import Routing

if TYPE_CHECKING:
    from fader_adapters.kernels.backend import BaseLinear


class CudaSite:
    """One site: its base and the deltas of all members.

    In a step of one-token rows what the deltas need of x is computed beside the base's product,
    and what is left of both is added up by one kernel wherever that product lies in planes.
    """

    def __init__(self, bound: DeltaSite, base: "BaseLinear", beside: Beside) -> None:
        self.base = base
        self._bound = bound
        self._beside = beside

    def __call__(self, x: torch.Tensor, step: object | None) -> torch.Tensor:
        base, bound = self.base, self._bound
        if step is None:
            return base(x)
        assert isinstance(step, LoraStep)
        whole = len(step.launches) == 1
        if whole:
            with self._beside():
                shrink(x, bound, step)
        planes = base.planes(x) if step.covers and isinstance(base, nf4.Nf4Linear) else None
        if not whole:
            return self._by_pieces(x, step, planes)
        if planes is None:
            y = base(x)
            self._beside.join()
            add(y, bound, step, base.bias)
            return y
        y = torch.empty(planes.shape[1:], dtype=x.dtype, device=x.device)
        self._beside.join()
        join(planes, y, bound, step, base.bias)
        return y

    def _by_pieces(
        self, x: torch.Tensor, step: LoraStep, planes: torch.Tensor | None
    ) -> torch.Tensor:
        """One after the other, after the base's product: they share one scratch."""
        base, bound = self.base, self._bound
        if planes is None:
            y = base(x)
            delta(y, x, bound, step, base.bias)
        else:
            y = torch.empty(planes.shape[1:], dtype=x.dtype, device=x.device)
            joined(planes, x, y, bound, step, base.bias)
        return y


class CudaLookup:
    """The delta of one embedding, two launches."""

    def __init__(self, bound: DeltaSite) -> None:
        self._bound = bound

    def __call__(self, y: torch.Tensor, ids: torch.Tensor, step: object | None) -> None:
        if step is not None:
            assert isinstance(step, LoraStep)
            lookup_delta(y, ids, self._bound, step)


class CudaStack:
    """The deltas of one stack of experts, or of a router; none where no row changes any."""

    def __init__(self, bound: StackSite) -> None:
        self._bound = bound

    def __call__(
        self, y: torch.Tensor, x: torch.Tensor, routing: Routing, step: object | None
    ) -> torch.Tensor:
        if step is not None:
            assert isinstance(step, LoraStep)
            if step.stacks:
                stack_delta(y, x, routing, self._bound, step)
        return y
