"""A merged lane on the CUDA backend, interpreted: the reference's tokens, graphs of its own."""

import pytest
import torch
from triton.runtime.errors import OutOfResources

from fader_server.model import graphs
from tests.adapters.cuda.test_backend import Setting, same, told, use_cuda, use_graphs
from tests.support.lanes import merge, publish
from tests.support.world import Ask, TinyWorld, greedy

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny engine is on the CPU")

BLEND = {"a": 0.7, "b": -0.4}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("llama"))


def asks() -> list[Ask]:
    return [Ask([5, 6, 7], BLEND, greedy(3)), Ask([8, 9, 10, 11], {"a": 1.0}, greedy(3))]


def lane_in(world: TinyWorld):
    return publish(world, merge(world, BLEND, form="nf4"))


REFUSED = RuntimeError("CUDA error: operation failed due to a previous error during capture")
TOO_LARGE = OutOfResources(300_000, 232_448, "shared memory")


@pytest.mark.slow
@pytest.mark.parametrize("fault", [REFUSED, TOO_LARGE], ids=["the device", "the compiler"])
def test_a_lane_whose_steps_cannot_be_captured_gives_them_too(
    setting: Setting,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: Exception,
) -> None:
    reference = setting.world()
    lane_in(reference)
    want = told(reference.run(asks()))
    serving: list[bool] = []

    def record(run: graphs.Run) -> graphs.Run:
        if serving:
            raise fault
        return run

    use_cuda(monkeypatch)
    use_graphs(monkeypatch, record)
    world = setting.world()
    opened = lane_in(world)
    serving.append(True)
    same(told(world.run(asks())), want)
    own = world.runner._lanes[opened.lane].replays
    assert isinstance(own, graphs.DecodeGraphs)
    assert own.captured == []
    assert caplog.text.count(f"without further CUDA graphs: {str(fault)[:20]}") == 1


@pytest.mark.slow
def test_a_lane_gives_the_references_tokens_through_graphs_of_its_own(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = setting.world()
    lane_in(reference)
    want = told(reference.run(asks()))
    use_cuda(monkeypatch)
    use_graphs(monkeypatch)
    world = setting.world()
    before = told(world.run(asks()[1:]))
    opened = lane_in(world)
    got = told(world.run(asks()))
    same(got, want)
    assert got[1:] == before, "the neighbour's bits"
    own = world.runner._lanes[opened.lane].replays
    assert isinstance(own, graphs.DecodeGraphs)
    assert own.captured == [(1, "base")], "captured when a step first asked for it"
    assert own is not world.runner._replays
