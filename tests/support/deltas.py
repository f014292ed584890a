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
        plain = x.double() @ dense(self.weight, torch.float32).double().T
        y = plain.clone()
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
                        span = (slice(begin, begin + row.tokens), slice(column, column + out))
                        y[span] += delta
                        gain, bias = self._vectors(slot, linear, out)
                        y[span] += gamma * gain * plain[span]
                        y[span] += gamma * float(t.scale[slot, linear]) * bias
                    column += out
            begin += row.tokens
        return y

    def _vectors(self, slot: int, linear: int, out: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gain and bias [out] in fp64, zeros where there is none."""
        found = []
        for table in (self.tables.gain_offset, self.tables.bias_offset):
            at = int(table[slot, linear])
            values = self.tables.arena[at : at + out] if at >= 0 else torch.zeros(out)
            found.append(values.double())
        return found[0], found[1]


def make_world(
    ranks: Sequence[Sequence[int]], dtype: torch.dtype, *, seed: int = 0, vectors: bool = False
) -> World:
    """`ranks[slot]` gives the rank at each of the two linears; 0 leaves a linear untouched.

    `vectors`: slots 0, 3, 6… have a gain and slots 1, 3, 5… a bias.
    """
    g = torch.Generator().manual_seed(seed)
    linears = tuple(LinearSpec(f"l{i}", IN, out, 0) for i, out in enumerate(OUTS))
    base = BaseSpec(linears, Digest("0" * 64), "test")
    arena = torch.full((1 << 18,), float("nan"), dtype=dtype)
    tables = Tables(arena, len(OUTS))
    offset = 64
    for slot, pair in enumerate(ranks):
        gain, bias = vectors and slot % 3 == 0, vectors and slot % 2 == 1
        parts = [
            RankScale(i, rank, 0.25 + 0.5 * i, gain, bias) for i, rank in enumerate(pair) if rank
        ]
        spec = lay_out(base, Digest(f"{slot:064x}"), parts)
        for delta in spec.deltas:
            for start, width in ((delta.a_offset, IN), (delta.b_offset, OUTS[delta.linear])):
                values = torch.randn(delta.rank * width, generator=g) * 0.1
                arena[offset + start : offset + start + values.numel()] = values.to(dtype)
            for start in (delta.gain_offset, delta.bias_offset):
                if start is not None:
                    values = torch.randn(OUTS[delta.linear], generator=g) * 0.2
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
