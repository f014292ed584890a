"""Work aside waits for nothing that others queue meanwhile, and has ended when it says so."""

from contextlib import nullcontext, suppress

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_adapters.aside import Aside
from fader_adapters.merged_site import chunk_rows
from tests.support.pretend_cuda import PretendDevice, PretendFault, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("apart", [True, False])
def test_a_wait_aside_is_not_one_for_what_others_queue(device: PretendDevice, apart: bool) -> None:
    clocks, default = device.clocks, device.default
    with Aside(CUDA)() if apart else nullcontext():
        given = torch.ones(4, device=CUDA)
        with torch.cuda.stream(default):
            torch.ones(4, device=CUDA)
        queued = clocks.last(default.number)
        given.cpu()
    assert clocks.done(default.number, queued) is not apart


def test_it_comes_after_what_was_queued_before(device: PretendDevice) -> None:
    weights = torch.ones(4, device=CUDA)
    with Aside(CUDA)():
        assert (weights + 1).tolist() == [2.0] * 4


def test_without_that_a_race_is_noticed(device: PretendDevice) -> None:
    weights = torch.ones(4, device=CUDA)
    with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(PretendFault, match="no event"):
        weights + 1


def test_its_results_are_there_for_every_stream(device: PretendDevice) -> None:
    with Aside(CUDA)():
        made = torch.ones(4, device=CUDA) * 3
    assert (made + 1).tolist() == [4.0] * 4
    with suppress(KeyError), Aside(CUDA)():
        made = torch.ones(4, device=CUDA) * 5
        raise KeyError
    assert (made + 1).tolist() == [6.0] * 4


@pytest.mark.parametrize("waits", [True, False])
def test_memory_taken_aside_is_given_back_when_its_last_reader_ended(
    device: PretendDevice, waits: bool
) -> None:
    aside = Aside(CUDA)
    with aside():
        made = torch.ones(4, device=CUDA)
    used = made + 1
    ended = aside.reached()
    if waits:
        ended()
    del made
    if waits:
        device.check()
    else:
        with pytest.raises(PretendFault, match="given back"):
            device.check()
    del used


def test_a_cpu_works_where_it_stands() -> None:
    aside = Aside(torch.device("cpu"))
    with aside():
        assert torch.ones(2).tolist() == [1.0, 1.0]
    aside.reached()()


def test_pieces_on_a_gpu_are_so_large_that_copies_do_not_count() -> None:
    assert chunk_rows(4096, CUDA) == 1024
    assert chunk_rows(4096, torch.device("cpu")) == 32
