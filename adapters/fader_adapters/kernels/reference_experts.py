"""The specification of a stack's deltas in plain torch."""

import torch

from fader_adapters.kernels.dense import linear
from fader_adapters.kernels.reference import ReferenceStep
from fader_adapters.kernels.routing import Routing
from fader_adapters.spec import SiteSpec


class ReferenceStack:
    """A stack's deltas, one term and one expert after the other."""

    def __init__(self, site: SiteSpec, experts: int) -> None:
        self.site = site
        self.experts = experts

    def __call__(
        self, y: torch.Tensor, x: torch.Tensor, routing: Routing, step: object | None
    ) -> torch.Tensor:
        if step is None:
            return y
        assert isinstance(step, ReferenceStep)
        (member,), (out,) = self.site.linears, self.site.out_features
        width, n = self.site.in_features, self.experts
        total = y.float()
        for share, own in step.at(member, (n * width, n * out)):
            gamma = share.gamma.new_zeros(int(routing.token.max()) + 1, 1)
            gamma[share.tokens] = share.gamma
            rank = own.a.shape[0]
            a = own.a.view(n, rank, width)
            b = own.b.T.reshape(n, rank, out)
            for expert in range(n):
                here = (routing.expert == expert) & (gamma[routing.token, 0] != 0)
                z = linear(x[here].float(), a[expert])
                total[here] += linear(
                    z * (gamma[routing.token[here]] * own.scale), b[expert].T.contiguous()
                )
        return total.to(y.dtype)
