"""Deltas of a mixture's experts and router: right to the bit, and their cost beside the experts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bench.gpu.deltas import mix
from bench.gpu.parity import demand, limit, mixes
from bench.gpu.section import BitsDiffer, ParityFailed, Result, Rig, gate
from bench.gpu.timing import Times, captured, turns
from bench.gpu.weights import publish_adapters, rms
from fader_adapters.kernels.cuda.expert_calls import stack_delta
from fader_adapters.kernels.cuda.lora import DeltaKernels
from fader_adapters.kernels.cuda.lora_step import LoraStep, StackSite
from fader_adapters.kernels.cuda.plain_experts import CudaStackWeight
from fader_adapters.kernels.routing import Routing
from fader_adapters.kernels.stack_weights import StackWeight
from fader_adapters.kernels.tables import Tables
from fader_adapters.spec import BaseSpec, Digest, LinearSpec, SiteSpec, StepTerms


@dataclass(frozen=True)
class Mixture:
    """One mixture of a decoder layer."""

    hidden: int
    inter: int
    experts: int
    chosen: int

    @property
    def base(self) -> BaseSpec:
        """Gate and up, down, and the router."""
        experts = {"role": "experts", "experts": self.experts}
        linears = (
            LinearSpec("gate_up", self.hidden, 2 * self.inter, 0, **experts),
            LinearSpec("down", self.inter, self.hidden, 0, **experts),
            LinearSpec("router", self.hidden, self.experts, 0, role="router"),
        )
        return BaseSpec(linears, Digest("0" * 64), "suite")

    def routing(self, tokens: int, spec: LinearSpec, rig: Rig) -> Routing:
        """Of so many tokens, each to distinct experts; of a router, to the one there is."""
        if spec.experts == 1:
            return Routing.of(torch.zeros(tokens, 1, dtype=torch.int64, device=rig.device), 1)
        luck = torch.rand(tokens, self.experts, device=rig.device)
        return Routing.of(luck.topk(self.chosen).indices, self.experts)


QWEN3_30B = Mixture(2048, 768, 128, 8)
SMALL = Mixture(64, 48, 4, 2)
ROUTINGS = 8
"""That take turns: their experts are some millions of weights each."""


def _bound(rig: Rig, base: BaseSpec) -> tuple[DeltaKernels, list[StackSite]]:
    arch = None if rig.on_gpu else 80
    kernels = DeltaKernels(rig.device, rig.dtype, arch=arch, entries=16 if rig.small else 1024)
    sites = [
        kernels.bind_stack(SiteSpec((i,), linear.in_features, (linear.out_features,)))
        for i, linear in enumerate(base.linears)
    ]
    return kernels, sites


def _expected(
    y: torch.Tensor,
    x: torch.Tensor,
    routing: Routing,
    site: StackSite,
    tables: Tables,
    terms: StepTerms,
) -> torch.Tensor:
    """y plus the deltas, term by term and expert by expert, in float64."""
    y, begin, arena = y.double().clone(), 0, tables.arena
    for row in terms.rows:
        own = (routing.token >= begin) & (routing.token < begin + row.tokens)
        for slot, gamma in row.terms:
            rank, scale = int(tables.rank[slot, site.linear]), tables.scale[slot, site.linear]
            for expert in routing.expert[own].unique().tolist():
                here = own & (routing.expert == expert)
                a, b = (
                    arena[at : at + rank * width].view(rank, width).double()
                    for offset, width in (
                        (tables.a_offset, site.in_features),
                        (tables.b_offset, site.out_features),
                    )
                    for at in (int(offset[slot, site.linear]) + expert * rank * width,)
                )
                y[here] += (x[here].double() @ a.T) @ b * (float(scale) * gamma)
        begin += row.tokens
    return y


def check_experts(rig: Rig, result: Result) -> None:
    """Every mix at experts and router, in the activations' dtype and, as some routers compute, in
    float32, against float64; and rows alone."""
    shape = SMALL if rig.small else QWEN3_30B
    base, ranks = shape.base, (1, 8, 20) if rig.small else (1, 8, 16, 20, 64)
    tables = publish_adapters(base, ranks, rig)
    kernels, sites = _bound(rig, base)
    worst, other_bits = 0.0, []
    for name, terms in mixes(len(ranks), 2 if rig.small else 48).items():
        tokens = sum(row.tokens for row in terms.rows)
        for site, spec in zip(sites, base.linears, strict=True):
            for dtype in {rig.dtype, torch.float32} if spec.role == "router" else {rig.dtype}:
                rig.check_time()
                routing = shape.routing(tokens, spec, rig)
                pairs = len(routing.token)
                x = torch.randn(pairs, site.in_features, device=rig.device).to(dtype)
                y = torch.randn(pairs, site.out_features, device=rig.device).to(dtype)
                got = _run(kernels, tables, terms, site, routing, x, y)
                want = _expected(y, x, routing, site, tables, terms)
                error = rms(got, want)
                demand(error, limit(rig), f"deltas of {spec.path} for {name}")
                worst = max(worst, error)
                if rms(y, want) <= limit(rig):
                    raise ParityFailed("the comparison does not notice missing deltas")
                own = routing.token == 0
                place = routing.order[own] % routing.chosen
                first = torch.empty(1, routing.chosen, dtype=torch.int64, device=rig.device)
                first[0, place] = routing.expert[own]
                row = StepTerms((terms.rows[0],))
                if row.rows[0].tokens == 1 and row.rows[0].terms:
                    alone = Routing.of(first, routing.experts)
                    single = _run(kernels, tables, row, site, alone, x[own], y[own])
                    if not torch.equal(single, got[own]):
                        other_bits.append(f"{spec.path} for {name}")
    if other_bits:
        raise BitsDiffer(f"deltas of experts: rows have other bits alone in {other_bits}")
    result.add(
        f"deltas of experts: relative error {worst:.1e}, bits alone = in company", error=worst
    )


def _run(
    kernels: DeltaKernels,
    tables: Tables,
    terms: StepTerms,
    site: StackSite,
    routing: Routing,
    x: torch.Tensor,
    y: torch.Tensor,
) -> torch.Tensor:
    step = kernels.prepare(tables, terms)
    assert step is not None
    got = y.clone()
    stack_delta(got, x, routing, site, step)
    return got


def measure_experts(rig: Rig, result: Result) -> None:
    """What deltas of all experts add to a mixture's two products in a decode step, by rows."""
    gate(check_experts, rig, result)
    shape = SMALL if rig.small else QWEN3_30B
    base = shape.base
    weights = [
        CudaStackWeight.of(StackWeight(torch.randn(shape_of(s), device=rig.device).to(rig.dtype)))
        for s in base.linears[:2]
    ]
    rank = 8 if rig.small else 16
    for rows, distinct in ((2, 1), (2, 2)) if rig.small else ((1, 1), (8, 8), (32, 1), (32, 32)):
        rig.check_time()
        routings = [
            shape.routing(rows, base.linears[0], rig) for _ in range(2 if rig.small else ROUTINGS)
        ]
        inputs = [
            torch.randn(len(routings[0].token), s.in_features, device=rig.device).to(rig.dtype)
            for s in base.linears[:2]
        ]
        outs = [w.grouped(x, routings[0]) for w, x in zip(weights, inputs, strict=True)]
        works = []
        for tables in _turns(base, (rank,) * distinct, rig):
            kernels, sites = _bound(rig, base)
            step = kernels.prepare(tables, mix(rows, distinct, 1))
            assert step is not None
            works.append([_deltas(sites, outs, inputs, routing, step) for routing in routings])
        deltas = captured(rig, [work for turn in zip(*works, strict=True) for work in turn])
        plain = _plain(rig, weights, inputs, routings)
        result.add(
            f"experts r={rank} rows={rows} adapters={distinct}: {deltas.median * 1e3:.0f} µs"
            f", {deltas.median / plain.median:.3f}× their products",
            rank=rank,
            rows=rows,
            distinct=distinct,
            **deltas.facts("deltas"),
            **plain.facts("products"),
        )


def shape_of(spec: LinearSpec) -> tuple[int, int, int]:
    """Of a stack's weight."""
    return spec.experts, spec.out_features, spec.in_features


def _turns(base: BaseSpec, ranks: tuple[int, ...], rig: Rig) -> list[Tables]:
    """As many sets of adapters as no cache holds."""
    first = publish_adapters(base, ranks, rig)
    more = turns(first.arena.nbytes, rig) - 1
    return [first, *(publish_adapters(base, ranks, rig) for _ in range(more))]


def _deltas(
    sites: list[StackSite],
    outs: list[torch.Tensor],
    inputs: list[torch.Tensor],
    routing: Routing,
    step: LoraStep,
) -> Callable[[], None]:
    def work() -> None:
        for site, y, x in zip(sites, outs, inputs, strict=False):
            stack_delta(y, x, routing, site, step)

    return work


def _plain(
    rig: Rig, weights: list[StackWeight], inputs: list[torch.Tensor], routings: list[Routing]
) -> Times:
    """The experts' own products, by each routing in turn."""

    def work(routing: Routing) -> None:
        for weight, x in zip(weights, inputs, strict=True):
            weight.grouped(x, routing)

    return captured(rig, [partial(work, routing) for routing in routings])
