"""Which backend a machine gets, and the one line it is told when that is not the fast one."""

import importlib.util
import logging

import pytest
import torch

from fader_adapters.errors import BaseUnsupported, KernelUnavailable
from fader_adapters.kernels.backend import choose
from fader_adapters.kernels.cuda import backend
from fader_adapters.kernels.dense import DenseLinear
from fader_adapters.kernels.nf4 import Nf4Weight
from fader_adapters.kernels.nf4_stack import Nf4Stack
from fader_adapters.kernels.reference import ReferenceBackend
from fader_adapters.kernels.stack_weights import StackWeight
from fader_adapters.spec import SiteSpec

GPU, CPU = torch.device("cuda"), torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is not there: its capability is asked for, and a first kernel is run."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(backend, "_trial", lambda device: True)


def refused(name: str = "cuda", device: torch.device = GPU) -> str:
    with pytest.raises(KernelUnavailable) as caught:
        choose(device, BF16, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_gets_the_cuda_backend(
    name: str, ampere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = object()
    monkeypatch.setattr(backend, "CudaBackend", lambda device, dtype: made)
    assert choose(GPU, BF16, name) is made


def test_without_triton_the_reference_runs_and_says_so_once(
    ampere: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert isinstance(choose(GPU, BF16), ReferenceBackend)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "slow" in line
    assert "triton is not installed" in line
    assert caplog.records[0].levelno == logging.WARNING
    assert "triton is not installed" in refused()


@pytest.mark.parametrize("name", ["auto", "cuda", "reference"])
def test_a_gpu_that_is_not_the_current_one_is_refused_with_what_to_do(
    name: str, ampere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    told = refused(name, torch.device("cuda", 1))
    assert "on cuda:1 and the current device is cuda:0" in told
    assert "torch.cuda.set_device(1)" in told
    assert "CUDA_VISIBLE_DEVICES=1" in told
    made = object()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(backend, "CudaBackend", lambda device, dtype: made)
    chosen = choose(torch.device("cuda", 1), BF16, name)
    assert (chosen is made) == (name != "reference")


def test_weights_on_another_device_than_the_backend_are_refused() -> None:
    """A model that `device_map="auto"` spread over several."""
    made = backend.CudaBackend(CPU, torch.float32)
    away = torch.zeros(4, 64, device="meta")
    spread = Nf4Weight(away.byte(), away, 4, 64)
    for ask in (
        lambda: made.linear([spread], None),
        lambda: made.bind(SiteSpec((0,), 64, (4,)), DenseLinear(away, None)),
        lambda: made.pack_stack(StackWeight(away[None])),
        lambda: made.pack_stack(Nf4Stack(spread, 1, None)),
    ):
        with pytest.raises(BaseUnsupported, match="weights on cpu, got some on meta; load the"):
            ask()
    made.bind(SiteSpec((0,), 64, (4,)), DenseLinear(torch.zeros(4, 64), None))


def test_an_old_gpu_is_told_its_capability(ampere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "compute capability 7.5 is below 8.0; use an Ampere" in refused()


def test_a_missing_compiler_shows_at_start(ampere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def trial(device: torch.device) -> bool:
        raise RuntimeError("Failed to find C compiler. Please specify via CC.\nmore advice")

    monkeypatch.setattr(backend, "_trial", trial)
    told = refused()
    assert "Failed to find C compiler" in told
    assert "gcc" in told


def test_a_first_kernel_with_wrong_numbers_is_refused(
    ampere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_trial", lambda device: False)
    assert "wrong numbers" in refused()


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on the CPU")
def test_the_first_kernel_knows_right_codes_from_wrong_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert backend._trial(CPU)
    monkeypatch.setattr(backend, "CODES", [*backend.CODES[:-1], 0.9])
    assert not backend._trial(CPU)


def test_a_cpu_has_no_cuda_backend_and_a_gpu_no_native_one() -> None:
    assert "use --device cuda" in refused(device=CPU)
    assert "it runs on the CPU" in refused("native")


def test_a_dtype_it_does_not_compute_in_is_refused(ampere: None) -> None:
    assert "not in torch.float64" in backend.obstacle(GPU, torch.float64)
