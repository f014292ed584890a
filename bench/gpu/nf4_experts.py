"""Experts in NF4: right to the bit, and their products beside those of unquantised ones."""

from collections.abc import Callable, Sequence

import torch

from bench.gpu.experts import QWEN3_30B, Mixture, shape_of
from bench.gpu.parity import demand, limit
from bench.gpu.section import BitsDiffer, ParityFailed, Result, Rig, gate
from bench.gpu.timing import Times, bandwidth, captured
from bench.gpu.weights import exact, nf4_weight, rms
from fader_adapters.kernels.backend import ExpertsWeight
from fader_adapters.kernels.cuda.nf4 import Scratch
from fader_adapters.kernels.cuda.nf4_experts import CudaNf4Stack
from fader_adapters.kernels.cuda.plain_experts import CudaStackWeight
from fader_adapters.kernels.nf4 import Nf4Weight
from fader_adapters.kernels.routing import Routing
from fader_adapters.kernels.stack_weights import StackWeight
from fader_adapters.spec import LinearSpec

SMALL = Mixture(64, 64, 4, 2)
HALF_LIMIT = 4e-3
"""Relative error of a 16-bit dtype: codes and results are rounded once each."""


def check_nf4_experts(rig: Rig, result: Result) -> None:
    """Both products of a mixture by tokens, in every dtype, against float64; and a token's alone
    and in company."""
    shape = SMALL if rig.small else QWEN3_30B
    scratch = Scratch(rig.device, 1 << 20)
    # small ones meet one height of tiles, by which the interpreter's products order their sums
    sizes = (1, 3, 16) if rig.small else (1, 3, 8, 33, 150, 700)
    worst, other_bits = 0.0, []
    for spec in shape.base.linears[:2]:
        weight, stack = _stack(rig, spec, scratch, bias=True)
        for tokens in sizes:
            rig.check_time()
            routing = shape.routing(tokens, spec, rig)
            x = torch.randn(len(routing.token), spec.in_features, device=rig.device).to(rig.dtype)
            got, want = stack.grouped(x, routing), _expected(weight, stack.bias, x, routing)
            error = rms(got, want)
            demand(error, limit(rig), f"NF4 experts, {spec.path} of {tokens} tokens")
            worst = max(worst, error)
            if rms(got, 1.02 * want) <= limit(rig):
                raise ParityFailed("the comparison does not notice two percent")
            for token in {0, tokens // 2, tokens - 1}:
                own = routing.token == token
                alone = Routing.of(routing.expert[own][None], routing.experts)
                if not torch.equal(stack.grouped(x[own], alone), got[own]):
                    other_bits.append(f"{spec.path} among {tokens} tokens")
        for dtype in {torch.float16, torch.float32} - {rig.dtype}:
            routing = shape.routing(3, spec, rig)
            x = torch.randn(len(routing.token), spec.in_features, device=rig.device).to(dtype)
            error = rms(stack.grouped(x, routing), _expected(weight, stack.bias, x, routing))
            most = 1e-5 if dtype == torch.float32 else HALF_LIMIT
            demand(error, most, f"NF4 experts, {spec.path} in {dtype}")
    if other_bits:
        raise BitsDiffer(f"NF4 experts: tokens have other bits alone than in {other_bits}")
    result.add(f"NF4 experts: relative error {worst:.1e}, bits alone = in company", error=worst)


def _stack(
    rig: Rig, spec: LinearSpec, scratch: Scratch, *, bias: bool
) -> tuple[Nf4Weight, CudaNf4Stack]:
    weight = nf4_weight(spec.experts * spec.out_features, spec.in_features, rig)
    shape = (spec.experts, spec.out_features, spec.in_features)
    added = torch.randn(shape[:2], device=rig.device).to(rig.dtype) if bias else None
    return weight, CudaNf4Stack([weight], shape, added, scratch)


def _expected(
    weight: Nf4Weight, bias: torch.Tensor | None, x: torch.Tensor, routing: Routing
) -> torch.Tensor:
    """The pairs' products, expert by expert, in float64."""
    out = weight.out_features // routing.experts
    y = torch.empty(len(x), out, dtype=torch.float64, device=x.device)
    for expert in routing.expert.unique().tolist():
        own = routing.expert == expert
        dense = exact(weight.rows(expert * out, (expert + 1) * out))
        y[own] = x[own].double() @ dense.T
        if bias is not None:
            y[own] += bias[expert].double()
    return y


def measure_nf4_experts(rig: Rig, result: Result) -> None:
    """Both products of a mixture by tokens, the experts chosen anew each time, beside those of
    unquantised experts."""
    gate(check_nf4_experts, rig, result)
    shape = SMALL if rig.small else QWEN3_30B
    linears = shape.base.linears[:2]
    scratch = Scratch(rig.device, 1 << 20)
    ours = [_stack(rig, spec, scratch, bias=False)[1] for spec in linears]
    plain = [
        CudaStackWeight.of(
            StackWeight(torch.randn(shape_of(spec), device=rig.device, dtype=rig.dtype))
        )
        for spec in linears
    ]
    for tokens, turns in ((1, 2), (4, 2)) if rig.small else ((1, 16), (8, 8), (32, 4), (1024, 2)):
        rig.check_time()
        routings = [shape.routing(tokens, linears[0], rig) for _ in range(turns)]
        times = {"fader": _times(rig, ours, routings), "dense": _times(rig, plain, routings)}
        _tell(rig, result, tokens, times, ours, routings)


def _times(rig: Rig, stacks: Sequence[ExpertsWeight], routings: Sequence[Routing]) -> Times:
    """Of one call of each stack."""
    widths = [stack.rows(0, 1).shape[1] for stack in stacks]
    works: list[Callable[[], object]] = []
    for routing in routings:
        size = len(routing.token)
        inputs = [torch.randn(size, width, device=rig.device).to(rig.dtype) for width in widths]

        def work(
            routing: Routing = routing, inputs: list[torch.Tensor] = inputs
        ) -> list[torch.Tensor]:
            return [stack.grouped(x, routing) for stack, x in zip(stacks, inputs, strict=True)]

        works.append(work)
    return captured(rig, works)


def _tell(
    rig: Rig,
    result: Result,
    tokens: int,
    times: dict[str, Times],
    ours: Sequence[CudaNf4Stack],
    routings: Sequence[Routing],
) -> None:
    """What is read at least is the weights of the chosen experts, once."""
    chosen = sum(len(routing.expert.unique()) for routing in routings) / len(routings)
    nbytes = sum(stack.nbytes for stack in ours) * chosen / ours[0].experts
    pairs = len(routings[0].token)
    sizes = (stack.tiles.out_features * stack.tiles.in_features for stack in ours)
    flops = 2 * pairs * sum(sizes)
    median = times["fader"].median
    share = nbytes / bandwidth(rig) * 1e3 / median
    figure = {"tokens": tokens, "experts_chosen": chosen, "roofline_share": round(share, 4)}
    figure["tflop_per_s"] = round(flops / median / 1e9, 2)
    for way, found in times.items():
        figure |= found.facts(way)
    told = f"NF4 experts, {tokens} tokens: {median * 1e3:.0f} µs, {share:.0%} of copy bandwidth"
    told += f", {flops / median / 1e9:.0f} TFLOP/s"
    told += f", {times['dense'].median / median:.2f}× as fast as unquantised"
    result.add(told, **figure)
