"""A decoder layer's sites with deltas: right to the bit, and their cost by what a step holds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from bench.gpu.parity import check_lora, demand, limit
from bench.gpu.section import BitsDiffer, ParityFailed, Result, Rig, gate
from bench.gpu.shapes import LLAMA_8B, SPLIT
from bench.gpu.timing import Times, captured
from bench.gpu.weights import base_of, exact, expected_deltas, nf4_weight, publish_adapters, rms
from fader_adapters.kernels.cuda import nf4
from fader_adapters.kernels.cuda.beside import Beside
from fader_adapters.kernels.cuda.lora import DeltaKernels, LoraStep
from fader_adapters.kernels.cuda.sites import CudaSite
from fader_adapters.kernels.nf4 import Nf4Weight
from fader_adapters.kernels.tables import Tables
from fader_adapters.spec import RowTerms, StepTerms

SHIPPED = "beside, joined"
WAYS: Mapping[str, tuple[bool, bool]] = {
    SHIPPED: (True, True),
    "after, joined": (False, True),
    "beside, added": (True, False),
    "after, added": (False, False),
}
"""(x·Aᵀ beside the base's product, or after it; z·B with the sum of the product's planes, or into
its result)"""


class Layer:
    """The sites of so many decoder layers over random NF4, with the deltas of any adapters.

    Small ones are two, of which one has a product in planes.
    """

    def __init__(self, rig: Rig, *, layers: int, entries: int) -> None:
        self.rig, self._entries = rig, entries
        shapes = SPLIT.sites[1::2] if rig.small else LLAMA_8B.sites
        self.base, self.sites = base_of(shapes * layers)
        scratch = nf4.Scratch(rig.device)
        self.weights: list[Nf4Weight] = [
            nf4_weight(sum(s.out_features), s.in_features, rig) for s in self.sites
        ]
        self.linears = [nf4.Nf4Linear([weight], None, scratch) for weight in self.weights]
        self._streams = {True: Beside(rig.device), False: Beside(torch.device("cpu"))}

    def inputs(self, rows: int) -> list[torch.Tensor]:
        device, dtype = self.rig.device, self.rig.dtype
        return [torch.randn(rows, s.in_features, device=device).to(dtype) for s in self.sites]

    def prepared(self, tables: Tables, terms: StepTerms) -> tuple[DeltaKernels, list, LoraStep]:
        """Kernels, their bound sites and the step."""
        rig = self.rig
        arch = None if rig.on_gpu else 80
        kernels = DeltaKernels(rig.device, rig.dtype, arch=arch, entries=self._entries)
        bound = [kernels.bind(site) for site in self.sites]
        step = kernels.prepare(tables, terms)
        assert step is not None
        return kernels, bound, step

    def run(self, way: str, bound: Sequence, step: LoraStep) -> list[Callable]:
        """x → y of every site."""
        beside, joined = WAYS[way]
        step = step if joined else replace(step, covers=False)
        sites = [
            CudaSite(site, linear, self._streams[beside])
            for site, linear in zip(bound, self.linears, strict=True)
        ]
        return [lambda x, site=site: site(x, step) for site in sites]


def mix(rows: int, slots: int, terms: int) -> StepTerms:
    """Rows of one token, each with so many terms of its own."""
    return StepTerms(
        tuple(
            RowTerms(1, tuple(sorted(((i + j) % slots, 0.5 + j) for j in range(terms))))
            for i in range(rows)
        )
    )


def check_join(rig: Rig, result: Result) -> None:
    """Every site with deltas, each way, against float64; rows of the base, and rows alone."""
    layer = Layer(rig, layers=1, entries=64 if rig.small else 1024)
    ranks = (1, 8, 20) if rig.small else (1, 8, 16, 20, 64, 5, 32)
    tables = publish_adapters(layer.base, ranks, rig)
    rows = 5 if rig.small else 40
    terms = mix(rows, len(ranks), 2)
    terms = StepTerms(tuple(RowTerms(1) if i % 4 == 3 else r for i, r in enumerate(terms.rows)))
    inputs, worst, other_bits = layer.inputs(rows), 0.0, []
    for way in WAYS:
        rig.check_time()
        kernels, bound, step = layer.prepared(tables, terms)
        together = [run(x) for run, x in zip(layer.run(way, bound, step), inputs, strict=True)]
        for i, (x, got) in enumerate(zip(inputs, together, strict=True)):
            plain = x.double() @ exact(layer.weights[i]).T
            want = expected_deltas(plain, x, layer.sites[i], tables, terms)
            error = rms(got, want)
            demand(error, limit(rig), f"site {i} with deltas {way}")
            worst = max(worst, error)
            if rms(plain, want) <= limit(rig):
                raise ParityFailed("the comparison does not notice missing deltas")
            if not torch.equal(got[3], layer.linears[i](x)[3]):
                other_bits.append(f"site {i}, {way}: a row of the base")
        for row in (0, 1, rows - 1):
            step = kernels.prepare(tables, StepTerms(terms.rows[row : row + 1]))
            if step is None:
                continue
            for i, run in enumerate(layer.run(way, bound, step)):
                if not torch.equal(run(inputs[i][row : row + 1])[0], together[i][row]):
                    other_bits.append(f"site {i}, {way}: row {row} alone")
    if other_bits:
        raise BitsDiffer(f"sites with deltas: other bits in {other_bits}")
    result.add(
        f"sites with deltas: relative error {worst:.1e}, bits alone = in company", error=worst
    )


def measure_lora(rig: Rig, result: Result) -> None:
    """A decoder layer's four sites with deltas over the same without, by rank, rows and blends."""
    gate(check_lora, rig, result)
    gate(check_join, rig, result)
    layer = Layer(rig, layers=1 if rig.small else 8, entries=16 if rig.small else 2048)
    for rank, rows, distinct, terms in _loads(rig):
        rig.check_time()
        slots = max(distinct, terms)
        tables = publish_adapters(layer.base, (rank,) * slots, rig)
        _, bound, step = layer.prepared(tables, mix(rows, slots, terms))
        inputs = layer.inputs(rows)

        def once(runs: Sequence[Callable], inputs: list[torch.Tensor] = inputs) -> None:
            for run, x in zip(runs, inputs, strict=True):
                run(x)

        runs = {way: layer.run(way, bound, step) for way in WAYS}
        base = captured(rig, [lambda: once(layer.linears)])
        times = {way: captured(rig, [lambda own=own: once(own)]) for way, own in runs.items()}
        _tell(result, base, times, rank=rank, rows=rows, distinct=distinct, terms=terms)


def _tell(result: Result, base: Times, times: Mapping[str, Times], **load: int) -> None:
    ratios = {way: found.median / base.median for way, found in times.items()}
    told = ", ".join(f"{way} {ratio:.3f}" for way, ratio in ratios.items() if way != SHIPPED)
    rank, rows, distinct, terms = load.values()
    result.add(
        f"deltas r={rank} rows={rows} adapters={distinct} terms={terms}: {ratios[SHIPPED]:.3f}× "
        f"base ({told})",
        **load,
        ratios={way: round(ratio, 4) for way, ratio in ratios.items()},
        **base.facts("base"),
        **times[SHIPPED].facts("adapted"),
    )


def _loads(rig: Rig) -> tuple[tuple[int, int, int, int], ...]:
    """(rank, rows, distinct adapters, terms a row)"""
    if rig.small:
        return ((8, 2, 2, 1), (8, 2, 2, 2))
    return (
        (16, 1, 1, 1),
        (16, 8, 8, 1),
        (16, 32, 1, 1),
        (16, 32, 8, 1),
        (16, 32, 32, 1),
        (16, 32, 32, 2),
        (16, 32, 8, 2),
        (8, 32, 32, 1),
        (64, 32, 8, 1),
        (64, 1, 1, 1),
        (16, 64, 64, 1),
    )
