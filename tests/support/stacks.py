"""One stack of experts beside a linear, adapters of it in an arena, and the answer in fp64."""

from collections.abc import Sequence

import torch

from fader_adapters.kernels.routing import Routing
from fader_adapters.kernels.tables import Tables
from fader_adapters.spec import (
    BaseSpec,
    Digest,
    LinearSpec,
    RankScale,
    SiteSpec,
    StepTerms,
    lay_out,
)

IN, OUT, EXPERTS, CHOSEN = 96, 72, 5, 2
RANKS = (8, 16, 64, 1, 16, 8)
SITE = SiteSpec((1,), IN, (OUT,))


class World:
    """A stack beside a linear, and six adapters in an arena whose gaps are NaN."""

    def __init__(
        self, dtype: torch.dtype, *, slots: Sequence[int] = range(6), experts: int = EXPERTS
    ) -> None:
        """slots: of the adapters, in their order."""
        self.experts = experts
        g = torch.Generator().manual_seed(1)
        linears = (
            LinearSpec("q", IN, OUT, 0),
            LinearSpec("experts.up", IN, OUT, 0, role="experts", experts=experts),
        )
        base = BaseSpec(linears, Digest("0" * 64), "test")
        self.tables = Tables(torch.full((1 << 19,), float("nan"), dtype=dtype), len(linears))
        self.factors: dict[int, tuple[torch.Tensor, torch.Tensor, float]] = {}
        offset = 64
        for index, (slot, rank) in enumerate(zip(slots, RANKS, strict=True)):
            # one adapter leaves the stack alone
            part = RankScale(0 if index == 3 else 1, rank, 0.5)
            spec = lay_out(base, Digest(f"{slot:064x}"), [part])
            for delta in spec.deltas:
                stack = linears[delta.linear].experts
                a = (0.1 * torch.randn(stack, rank, IN, generator=g)).to(dtype)
                b = (0.1 * torch.randn(stack, rank, OUT, generator=g)).to(dtype)
                for at, values in ((delta.a_offset, a), (delta.b_offset, b)):
                    start = offset + at
                    self.tables.arena[start : start + values.numel()] = values.view(-1)
                if delta.linear == 1:
                    self.factors[slot] = (a.double(), b.double(), delta.scale)
            self.tables.publish(slot, spec, offset)
            offset += spec.numel + 64

    def expected(
        self, y: torch.Tensor, x: torch.Tensor, routing: Routing, terms: StepTerms
    ) -> torch.Tensor:
        rows = [row.terms for row in terms.rows for _ in range(row.tokens)]
        total = y.double()
        for pair, (token, expert) in enumerate(
            zip(routing.token.tolist(), routing.expert.tolist(), strict=True)
        ):
            for slot, gamma in rows[token]:
                if slot in self.factors:
                    a, b, scale = self.factors[slot]
                    total[pair] += gamma * scale * (x[pair].double() @ a[expert].T) @ b[expert]
        return total


def chosen(tokens: int, *, experts: int = EXPERTS, count: int = CHOSEN) -> torch.Tensor:
    """[tokens, count]: a router's choice."""
    g = torch.Generator().manual_seed(2)
    return torch.stack([torch.randperm(experts, generator=g)[:count] for _ in range(tokens)])


COUNTS = {
    "one pair": (0, 0, 1, 0, 0),
    "few pairs": (1, 0, 3, 2, 1),
    "all at one": (0, 0, 0, 63, 0),
    "all at the last": (0, 0, 0, 0, 7),
    "skewed": (1, 133, 0, 5, 17),
    "even": (16, 17, 15, 33, 32),
}
"""Pairs of each of five experts."""


def counted(counts: Sequence[int], *, device: str = "cpu") -> Routing:
    """Of tokens with one expert each, so many of every expert."""
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return Routing.of(expert[:, None].to(device), len(counts))


def routed(tokens: int) -> Routing:
    return Routing.of(chosen(tokens), EXPERTS)
