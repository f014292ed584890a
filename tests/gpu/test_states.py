"""Layers that keep states on a GPU: fp64's numbers, a row's own bits, and nothing waits."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton")

from bench.gpu.section import Rig
from bench.gpu.states import LAYERS, StateLayer, check_layer, rows_at

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_gives_what_tensors_give_however_a_sequence_is_cut(
    kind: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    check_layer(StateLayer(LAYERS[kind], device, dtype), Rig(device, dtype, small=False))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_captured_step_takes_its_slots_from_where_they_then_are(kind: str) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    layer = StateLayer(LAYERS[kind], device, torch.bfloat16)
    given, prompt = layer.made_up(2), layer.made_up(20)
    layer(prompt, rows_at([9, 11], [-1, -1], [3, 4], device))
    fixed = rows_at([1, 1], [-1, -1], [-1, -1], device)
    layer(given, fixed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(given, fixed)
    want = layer(given, rows_at([1, 1], [4, 3], [5, 6], device))
    fixed.came_from.copy_(torch.tensor([4, 3]))
    fixed.to.copy_(torch.tensor([7, 8]))
    graph.replay()
    assert torch.equal(out, want)
    assert torch.equal(layer.scan.states[7:9], layer.scan.states[5:7])
    fixed.came_from.copy_(torch.tensor([3, 4]))
    graph.replay()
    assert not torch.equal(out, want)


def test_nothing_waits_for_the_device() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    layer = StateLayer(LAYERS["state space"], device, torch.bfloat16)
    given, rows = layer.made_up(9), rows_at([1] * 9, [-1] * 9, list(range(9)), device)
    layer(given, rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(given, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
