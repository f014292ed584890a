"""Random NF4 weights and adapters, made on the device, and their exact values."""

from collections.abc import Sequence

import torch

from bench.gpu.section import Rig
from fader_adapters.kernels.cuda.nf4_codes import CODES
from fader_adapters.kernels.nf4 import BLOCK, Nf4Weight
from fader_adapters.kernels.tables import Tables
from fader_adapters.spec import (
    AdapterSpec,
    BaseSpec,
    Digest,
    LinearSpec,
    RankScale,
    SiteSpec,
    StepTerms,
    lay_out,
)

SPREAD = 0.02
"""Standard deviation of a weight."""
B_SPREAD = 0.2
"""Of an adapter's B in parity checks: its delta then weighs as much as the base."""


def nf4_weight(out: int, width: int, rig: Rig) -> Nf4Weight:
    """Every nibble equally likely."""
    packed = torch.randint(0, 256, (out * width // 2,), dtype=torch.uint8, device=rig.device)
    absmax = torch.rand(out * width // BLOCK, device=rig.device) * SPREAD + SPREAD
    return Nf4Weight(packed, absmax, out, width)


def exact(weight: Nf4Weight) -> torch.Tensor:
    """W [out, in] in float64."""
    codes = torch.tensor(CODES, dtype=torch.float32, device=weight.packed.device).double()
    nibbles = torch.stack((weight.packed >> 4, weight.packed & 15), dim=1).flatten().long()
    values = codes[nibbles].view(-1, BLOCK) * weight.absmax.double()[:, None]
    return values.view(weight.out_features, weight.in_features)


def base_of(sites: Sequence[tuple[int, tuple[int, ...]]]) -> tuple[BaseSpec, tuple[SiteSpec, ...]]:
    """Linears that follow one another, and the sites over them."""
    linears: list[LinearSpec] = []
    specs = []
    for width, outs in sites:
        first = len(linears)
        linears += [LinearSpec(f"l{first + i}", width, out, 0) for i, out in enumerate(outs)]
        specs.append(SiteSpec(tuple(range(first, len(linears))), width, outs))
    return BaseSpec(tuple(linears), Digest("0" * 64), "suite"), tuple(specs)


def adapter_spec(base: BaseSpec, number: int, rank: int) -> AdapterSpec:
    """An adapter of one rank at every linear, expert and router; the output head stays the
    base's."""
    adapted = ("linear", "experts", "router")
    inner = [i for i, linear in enumerate(base.linears) if linear.role in adapted]
    parts = [RankScale(i, rank, 0.5 + 0.25 * (i % 3)) for i in inner]
    return lay_out(base, Digest(f"{number:064x}"), parts)


def fill(flat: torch.Tensor, spread: float = SPREAD) -> torch.Tensor:
    """Random values in place, without a second copy."""
    return flat.normal_(0.0, spread)


def publish_adapters(base: BaseSpec, ranks: Sequence[int], rig: Rig) -> Tables:
    """Tables whose slot i holds an adapter of ranks[i]; the arena's gaps are NaN."""
    specs = [adapter_spec(base, i, rank) for i, rank in enumerate(ranks)]
    size = 64 + sum(spec.numel + 64 for spec in specs)
    arena = torch.full((size,), torch.nan, dtype=rig.dtype, device=rig.device)
    tables = Tables(arena, len(base.linears))
    offset = 64
    for slot, spec in enumerate(specs):
        for delta in spec.deltas:
            linear = base.linears[delta.linear]
            for at, width, spread in (
                (delta.a_offset, linear.in_features, SPREAD),
                (delta.b_offset, linear.out_features, B_SPREAD),
            ):
                count = delta.rank * width * linear.experts
                fill(arena[offset + at : offset + at + count], spread)
        tables.publish(slot, spec, offset)
        offset += spec.numel + 64
    return tables


def expected_deltas(
    y: torch.Tensor, x: torch.Tensor, site: SiteSpec, tables: Tables, terms: StepTerms
) -> torch.Tensor:
    """y plus the deltas, term by term, in float64."""
    y = y.double().clone()
    begin = 0
    for row in terms.rows:
        span = slice(begin, begin + row.tokens)
        for slot, gamma in row.terms:
            column = 0
            for linear, out in zip(site.linears, site.out_features, strict=True):
                rank = int(tables.rank[slot, linear])
                a_at, b_at = (int(t[slot, linear]) for t in (tables.a_offset, tables.b_offset))
                a = tables.arena[a_at : a_at + rank * site.in_features].view(rank, -1).double()
                b = tables.arena[b_at : b_at + rank * out].view(rank, out).double()
                scale = float(tables.scale[slot, linear]) * gamma
                y[span, column : column + out] += (x[span].double() @ a.T) @ b * scale
                column += out
        begin += row.tokens
    return y


def rms(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float64; NaN when anything is."""
    want = want.double()
    return float((got.double() - want).norm() / want.norm())
