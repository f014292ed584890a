"""Random arenas, sites and steps for kernel tests, with the answer in fp64."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fader_adapters.kernels.nf4 import Nf4Weight, dense
from fader_adapters.kernels.tables import Tables
from fader_adapters.spec import (
    BaseSpec,
    Digest,
    LinearSpec,
    RankScale,
    RowTerms,
    SiteSpec,
    StepTerms,
    lay_out,
)

IN = 128
OUTS = (96, 64)


@dataclass(frozen=True)
class World:
    """One site of two linears and several adapters in an arena whose gaps are NaN."""

    site: SiteSpec
    weight: Nf4Weight
    tables: Tables

    def expected(self, x: torch.Tensor, terms: StepTerms) -> torch.Tensor:
        """[T, Σ out] in fp64, term by term."""
        t = self.tables
        y = x.double() @ dense(self.weight, torch.float32).double().T
        begin = 0
        for row in terms.rows:
            rows = x[begin : begin + row.tokens].double()
            for slot, gamma in row.terms:
                column = 0
                for linear, out in zip(self.site.linears, self.site.out_features, strict=True):
                    rank = int(t.rank[slot, linear])
                    if rank:
                        a, b = int(t.a_offset[slot, linear]), int(t.b_offset[slot, linear])
                        a_matrix = t.arena[a : a + rank * IN].view(rank, IN).double()
                        b_matrix = t.arena[b : b + rank * out].view(rank, out).double()
                        delta = rows @ a_matrix.T @ b_matrix * float(t.scale[slot, linear]) * gamma
                        y[begin : begin + row.tokens, column : column + out] += delta
                    column += out
            begin += row.tokens
        return y


def make_world(ranks: Sequence[Sequence[int]], dtype: torch.dtype, *, seed: int = 0) -> World:
    """`ranks[slot]` gives the rank at each of the two linears; 0 leaves a linear untouched."""
    g = torch.Generator().manual_seed(seed)
    linears = tuple(LinearSpec(f"l{i}", IN, out, 0) for i, out in enumerate(OUTS))
    base = BaseSpec(linears, Digest("0" * 64), "test")
    arena = torch.full((1 << 18,), float("nan"), dtype=dtype)
    tables = Tables(arena, len(OUTS))
    offset = 64
    for slot, pair in enumerate(ranks):
        parts = [RankScale(i, rank, 0.25 + 0.5 * i) for i, rank in enumerate(pair) if rank]
        spec = lay_out(base, Digest(f"{slot:064x}"), parts)
        for delta in spec.deltas:
            for start, width in ((delta.a_offset, IN), (delta.b_offset, OUTS[delta.linear])):
                values = torch.randn(delta.rank * width, generator=g) * 0.1
                arena[offset + start : offset + start + values.numel()] = values.to(dtype)
        tables.publish(slot, spec, offset)
        offset += spec.numel + 64
    out = sum(OUTS)
    weight = Nf4Weight(
        torch.randint(0, 256, (out * IN // 2,), generator=g, dtype=torch.uint8),
        torch.rand(out * IN // 64, generator=g) * 0.1,
        out,
        IN,
    )
    return World(SiteSpec((0, 1), IN, OUTS), weight, tables)


RANKS = ((8, 8), (16, 1), (64, 0), (1, 16), (16, 64), (0, 8))


def steps() -> dict[str, StepTerms]:
    """The mixes every fast path is tested over; T in 1, 7, 63, 133."""
    one = ((0, 1.0),)
    return {
        "base rows only": StepTerms((RowTerms(1),) * 7),
        "one adapter, one row": StepTerms((RowTerms(1, one),)),
        "one adapter, every row": StepTerms((RowTerms(1, one),) * 7),
        "all distinct": StepTerms(
            (*tuple(RowTerms(1, ((slot, 1.0),)) for slot in range(6)), RowTerms(1))
        ),
        "skewed": StepTerms(tuple(RowTerms(1, ((3 if i else 4, 1.0),)) for i in range(63))),
        "blends and prefill": StepTerms(
            (
                RowTerms(1, ((0, 0.5), (1, -0.7))),
                RowTerms(1, ((1, -0.7), (2, 2.0), (4, 0.1))),
                RowTerms(1),
                RowTerms(100, ((2, 1.0), (5, -1.5))),
                RowTerms(23),
                RowTerms(7, ((4, 0.3),)),
            )
        ),
    }
