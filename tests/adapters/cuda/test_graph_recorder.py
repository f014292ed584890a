"""What becomes of work that cannot be captured: told before a capture where that can be, and the
thread stays where it was."""

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_server.model.graphs import GraphRecorder
from tests.support.pretend_cuda import PretendDevice, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
CUDA = torch.device("cuda", 0)


@pytest.fixture
def x(device: PretendDevice) -> torch.Tensor:
    return torch.zeros(3, device=CUDA)


def test_a_run_that_waits_is_refused_before_it_is_captured(
    device: PretendDevice, x: torch.Tensor
) -> None:
    with pytest.raises(RuntimeError, match="synchronizing"):
        GraphRecorder(CUDA)(lambda: x.add_(x.sum().item()))
    assert device.captures == 0
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.cuda.current_stream() is device.default


def test_one_that_waits_only_when_it_first_runs_is_captured(
    device: PretendDevice, x: torch.Tensor
) -> None:
    made: list[torch.Tensor] = []

    def run() -> None:
        if not made:
            made.append(torch.ones(3).to(CUDA))
        x.copy_(made[0] * 2)

    replay = GraphRecorder(CUDA)(run)
    made[0].fill_(4)
    replay()
    assert x.tolist() == [8, 8, 8]
    assert torch.cuda.get_sync_debug_mode() == 0


def test_a_capture_that_fails_leaves_the_thread_on_the_stream_it_had(
    device: PretendDevice, x: torch.Tensor
) -> None:
    recorder = GraphRecorder(CUDA)
    recorder.checks = False
    with pytest.raises(RuntimeError, match="during capture"):
        recorder(lambda: x.add_(x.sum().item()))
    assert device.captures == 1
    assert torch.cuda.current_stream() is device.default
    recorder(lambda: x.fill_(3))()
    assert x.tolist() == [3, 3, 3]
