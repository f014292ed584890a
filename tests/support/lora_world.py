"""Random sites and adapters on any device, and what the deltas add in fp64."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

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


@dataclass(frozen=True)
class DeltaWorld:
    """Sites over consecutive linears and adapters in an arena whose gaps are NaN."""

    sites: tuple[SiteSpec, ...]
    tables: Tables

    def expected(
        self, y: torch.Tensor, x: torch.Tensor, site: SiteSpec, terms: StepTerms
    ) -> torch.Tensor:
        """y + the deltas, [T, Σ out] in fp64, term by term."""
        t, width = self.tables, site.in_features
        y = y.double().clone()
        begin = 0
        for row in terms.rows:
            span = slice(begin, begin + row.tokens)
            for slot, gamma in row.terms:
                column = 0
                for linear, out in zip(site.linears, site.out_features, strict=True):
                    rank = int(t.rank[slot, linear])
                    if rank:
                        a, b = int(t.a_offset[slot, linear]), int(t.b_offset[slot, linear])
                        a_matrix = t.arena[a : a + rank * width].view(rank, width).double()
                        b_matrix = t.arena[b : b + rank * out].view(rank, out).double()
                        z = x[span].double() @ a_matrix.T * (float(t.scale[slot, linear]) * gamma)
                        y[span, column : column + out] += z @ b_matrix
                    column += out
            begin += row.tokens
        return y


def make_delta_world(
    sites: Sequence[tuple[int, tuple[int, ...]]],
    ranks: Sequence[Sequence[int]],
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    seed: int = 0,
) -> DeltaWorld:
    """`sites` gives (in, (out of each member)); `ranks[slot]` the rank at each linear, or one rank
    for all of them; 0 leaves a linear untouched.
    """
    g = torch.Generator().manual_seed(seed)
    linears: list[LinearSpec] = []
    specs: list[SiteSpec] = []
    for width, outs in sites:
        begin = len(linears)
        linears += [LinearSpec(f"l{begin + i}", width, out, 0) for i, out in enumerate(outs)]
        specs.append(SiteSpec(tuple(range(begin, len(linears))), width, outs))
    base = BaseSpec(tuple(linears), Digest("0" * 64), "test")
    adapters = []
    for slot, given in enumerate(ranks):
        every = list(given) if len(given) > 1 else list(given) * len(linears)
        parts = [RankScale(i, r, 0.5 + 0.25 * (i % 3)) for i, r in enumerate(every) if r]
        adapters.append(lay_out(base, Digest(f"{slot:064x}"), parts))
    size = 64 + sum(spec.numel + 64 for spec in adapters)
    arena = torch.full((size,), float("nan"), dtype=dtype, device=device)
    tables = Tables(arena, len(linears))
    offset = 64
    for slot, spec in enumerate(adapters):
        for delta in spec.deltas:
            linear = linears[delta.linear]
            for start, width, spread in (
                (delta.a_offset, linear.in_features, linear.in_features**-0.5),
                (delta.b_offset, linear.out_features, delta.rank**-0.5),
            ):
                values = torch.randn(delta.rank * width, generator=g) * spread
                begin = offset + start
                arena[begin : begin + values.numel()] = values.to(device, dtype)
        tables.publish(slot, spec, offset)
        offset += spec.numel + 64
    return DeltaWorld(tuple(specs), tables)
