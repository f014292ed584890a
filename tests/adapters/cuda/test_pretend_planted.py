"""Faults that are planted in the server's own code are noticed on the pretended device."""

from collections.abc import Callable, Iterator

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_adapters.kernels.cuda.lora import DeltaKernels
from fader_adapters.pool import Pool
from fader_server.errors import EngineFault
from fader_server.model.graph_inputs import GraphInputs, Mirror
from fader_server.model.graphs import GraphRecorder
from tests.support.pretend_cuda import PretendDevice, unavailable
from tests.support.pretend_cuda.setting import Setting, check, on_device, opened
from tests.support.world import Ask, greedy

pytestmark = [
    pytest.mark.skipif(bool(unavailable()), reason=unavailable()),
    pytest.mark.slow,
]

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("llama"), adapters={"a": {"rank": 8}})


@pytest.fixture
def device(setting: Setting) -> Iterator[PretendDevice]:
    with on_device() as found:
        yield found


def run_early(patch: Patch) -> None:
    """Rows run before their adapters have arrived."""
    patch.setattr(Pool, "late", lambda self: ())


def read_early(patch: Patch) -> None:
    """Results are read before they have arrived."""

    def to_host(values: torch.Tensor) -> Callable[[], list[float]]:
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        return host.tolist

    patch.setattr("fader_server.model.sampler.to_host", to_host)


def overwrite(patch: Patch) -> None:
    """The host writes over what a copy still reads."""
    send = Mirror.send

    def sent(self: Mirror, start: int, stop: int) -> None:
        send(self, start, stop)
        self._host += 1

    patch.setattr(Mirror, "send", sent)


def go_on_at_once(patch: Patch) -> None:
    """The engine's stream does not wait for what ran on the recorder's."""

    def recorded(self: GraphRecorder, run: Callable[[], None]) -> Callable[[], None]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        return run

    patch.setattr(GraphRecorder, "__call__", recorded)


def move(patch: Patch) -> None:
    """Buffers that graphs know by address are made anew."""
    prepare = DeltaKernels.prepare

    def prepared(self: DeltaKernels, *given):
        self._fixed = None
        return prepare(self, *given)

    patch.setattr(DeltaKernels, "prepare", prepared)


def forget(patch: Patch) -> None:
    """A step's positions stay on the host."""
    fill = GraphInputs.fill

    def filled(self: GraphInputs, plan, bucket: int) -> None:
        kept = self._positions.clone()
        fill(self, plan, bucket)
        self._positions.copy_(kept)

    patch.setattr(GraphInputs, "fill", filled)


@pytest.mark.parametrize("plant", [run_early, read_early, overwrite, go_on_at_once, move, forget])
def test_a_planted_fault_is_noticed(
    setting: Setting, device: PretendDevice, monkeypatch: Patch, plant: Callable[[Patch], None]
) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, EngineFault)):
        check(setting, opened(setting), [Ask([5, 6, 7], {"a": 1.0}, greedy(3))])
    device.notices.told.clear()
    device.memory.faults.clear()


def test_without_one_there_is_nothing_to_notice(setting: Setting, device: PretendDevice) -> None:
    check(setting, opened(setting), [Ask([5, 6, 7], {"a": 1.0}, greedy(3))])
