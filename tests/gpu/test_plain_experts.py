"""Unquantised experts on a GPU by our kernel, which stands in where torch's grouped product waits
for the host: against float64, whichever way the weight lies, and by a captured graph."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton")

from fader_adapters.kernels.cuda.plain_experts import CudaStackWeight
from tests.support.nf4_weights import rms
from tests.support.stacks import counted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

EXPERTS, OUT, IN = 8, 1536, 2048
COUNTS = {
    "one pair": (0, 0, 1, 0, 0, 0, 0, 0),
    "few pairs": (1, 0, 3, 2, 1, 0, 0, 1),
    "skewed": (1, 700, 0, 5, 17, 0, 64, 1),
    "even": (30, 31, 29, 27, 16, 33, 32, 31),
}
LIMITS = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("transposed", [False, True])
def test_each_pair_meets_its_own_expert_alone_and_in_any_company(
    dtype: torch.dtype, transposed: bool
) -> None:
    torch.manual_seed(0)
    shape = (EXPERTS, IN, OUT) if transposed else (EXPERTS, OUT, IN)
    source, bias = torch.randn(shape).to("cuda", dtype), torch.randn(EXPERTS, OUT).to("cuda", dtype)
    weight = CudaStackWeight(source, bias, transposed=transposed)
    matrices = weight.values.double()
    for counts in COUNTS.values():
        routing = counted(counts, device="cuda")
        x = torch.randn(sum(counts), IN, device="cuda").to(dtype)
        got = weight.grouped(x, routing)
        want = bias.double()[routing.expert]
        for expert in range(EXPERTS):
            own = routing.expert == expert
            want[own] += x[own].double() @ matrices[expert].T
        assert rms(got, want) <= LIMITS[dtype]
        last = [0] * EXPERTS
        last[int(routing.expert[-1])] = 1
        assert torch.equal(weight.grouped(x[-1:], counted(last, device="cuda"))[0], got[-1])


def test_a_captured_graph_reads_another_routing() -> None:
    torch.manual_seed(0)
    weight = CudaStackWeight(torch.randn(EXPERTS, OUT, IN, device="cuda").bfloat16())
    first, second = (counted(c, device="cuda") for c in ((2, 2) * 4, (0, 8, 0, 1, 1, 0, 0, 6)))
    x = torch.randn(16, IN, device="cuda").bfloat16()
    weight.grouped(x, first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = weight.grouped(x, first)
    first.ends.copy_(second.ends)
    graph.replay()
    assert torch.equal(out, weight.grouped(x, second))
