"""The whole backend on a GPU: captured decode steps, copies beside them, company of rows."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
pytest.importorskip("triton", reason="the CUDA kernels need triton")


@pytest.fixture(scope="module")
def rig():
    from bench.gpu.section import Rig

    return Rig(torch.device("cuda", 0), torch.bfloat16, small=True)


def test_the_backend_is_chosen_and_its_first_kernel_is_right():
    from fader_adapters.kernels.backend import choose

    assert choose(torch.device("cuda"), torch.bfloat16).name == "cuda"


def test_replays_give_the_bits_of_the_models_code_and_rows_those_they_have_alone(rig):
    from bench.gpu.section import Result
    from bench.gpu.steps import check_graphs

    result = Result()
    check_graphs(rig, result)
    assert result.figures[0]["replays_checked"] > 0


def test_a_copy_on_the_side_stream_arrives_whole_and_is_seen_after_a_join():
    from fader_adapters.transfers import SideStream

    target = torch.full((1 << 22,), float("nan"), device="cuda")
    source = torch.randn(1 << 22).pin_memory()
    ticket = SideStream(torch.device("cuda")).copy(target, source)
    ticket.join()
    assert torch.equal(target.clone().cpu(), source)
    ticket.wait()
    assert ticket.done()


def test_a_copy_waits_for_kernels_that_read_what_it_overwrites():
    from fader_adapters.transfers import SideStream

    target = torch.ones(1 << 22, device="cuda")
    transfers = SideStream(target.device)
    source = torch.zeros(1 << 22).pin_memory()
    torch.cuda._sleep(50_000_000)
    read = target.sum()
    transfers.copy(target, source).wait()
    assert float(read) == 1 << 22
    assert float(target.sum()) == 0.0
