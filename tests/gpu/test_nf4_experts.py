"""Experts in NF4 on a GPU against float64: what no interpreter shows (the PTX lookup, the pipeline,
the matrix units, a routing that a captured graph reads anew)."""

from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton")

from fader_adapters.kernels.cuda import nf4_expert_configs as configs
from fader_adapters.kernels.cuda.nf4 import Scratch
from fader_adapters.kernels.cuda.nf4_experts import CudaNf4Stack
from fader_adapters.kernels.nf4 import Nf4Weight
from fader_adapters.kernels.routing import Routing
from tests.support.nf4_weights import random_weight, rms, values
from tests.support.stacks import counted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

EXPERTS = 8
SHAPES = [(1536, 2048), (2048, 768), (200, 192)]
COUNTS = {
    "one pair": (0, 0, 1, 0, 0, 0, 0, 0),
    "few pairs": (1, 0, 3, 2, 1, 0, 0, 1),
    "all at one": (0, 0, 0, 133, 0, 0, 0, 0),
    "skewed": (1, 700, 0, 5, 17, 0, 64, 1),
    "even": (30, 31, 29, 27, 16, 33, 32, 31),
}
LIMITS = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(
    out: int, width: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Nf4Weight, CudaNf4Stack]:
    weight = random_weight(EXPERTS * out, width, device="cuda")
    bias = torch.randn(EXPERTS, out).to("cuda", dtype)
    scratch = Scratch(torch.device("cuda"), 1 << 20)
    return weight, CudaNf4Stack([weight], (EXPERTS, out, width), bias, scratch)


def expect(weight: Nf4Weight, stack: CudaNf4Stack, x: torch.Tensor, expert: torch.Tensor):
    matrices = values(weight).cuda().view(EXPERTS, stack.tiles.out_features, -1)
    assert stack.bias is not None
    y = stack.bias.double()[expert]
    for which in expert.unique().tolist():
        own = expert == which
        y[own] += x[own].double() @ matrices[which].T
    return y


def inputs(counts: Sequence[int], width: int) -> tuple[torch.Tensor, Routing]:
    return torch.randn(sum(counts), width).to("cuda", torch.bfloat16), counted(
        counts, device="cuda"
    )


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_pair_meets_its_own_expert(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, stack = made(*shape, dtype)
    for counts in COUNTS.values():
        x, routing = inputs(counts, shape[1])
        got = stack.grouped(x.to(dtype), routing)
        assert got.dtype == dtype
        assert rms(got, expect(weight, stack, x, routing.expert)) <= LIMITS[dtype]
        assert rms(got, expect(weight, stack, x, (routing.expert + 1) % EXPERTS)) > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_pair_has_the_same_bits_alone_and_in_any_company(shape: tuple[int, int]) -> None:
    _, stack = made(*shape)
    x, routing = inputs(COUNTS["skewed"], shape[1])
    together = stack.grouped(x, routing)
    heights = set()
    for pair in (0, 1, 350, 700, 701, 710, 780, 787):
        expert = int(routing.expert[pair])
        for before, after in ((0, 0), (3, 1), (20, 40), (40, 60), (100, 200)):
            company = [before // 5] * EXPERTS
            company[expert] = before + 1 + after
            xs, other = inputs(company, shape[1])
            at = int((other.expert < expert).sum()) + before
            xs[at] = x[pair]
            assert torch.equal(stack.grouped(xs, other)[at], together[pair]), (pair, before)
            heights.add(configs.launch(90, sum(company), EXPERTS, shape[0]).bm)
    assert heights == {16, 32, 64, 128}
    assert not torch.equal(stack.grouped(x.flip(0), routing), together)


def test_a_captured_graph_reads_its_routing_anew() -> None:
    weight, stack = made(1536, 2048)
    x, routing = inputs(COUNTS["even"], 2048)
    stack.grouped(x, routing)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = stack.grouped(x, routing)
    pairs = sum(COUNTS["even"])
    for counts in ((pairs, *(0,) * 7), (*(0,) * 7, pairs), (1, 2, 3, 4, 5, 6, 7, pairs - 28)):
        xs, other = inputs(counts, 2048)
        x.copy_(xs)
        routing.ends.copy_(other.ends)
        y.fill_(torch.nan)
        graph.replay()
        assert rms(y, expect(weight, stack, x, other.expert)) <= LIMITS[torch.bfloat16]


def test_rows_are_the_codes_times_absmax() -> None:
    weight, stack = made(200, 192)
    assert torch.equal(stack.rows(150, 650), values(weight)[150:650].float().cuda())
    assert not torch.equal(stack.rows(150, 650), stack.rows(151, 651))
