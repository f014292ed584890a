"""`python -m bench.gpu_suite --small` on the pretended device: sections as a GPU would run them."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from bench import gpu_suite
from bench.gpu import timing
from bench.gpu.section import Rig, run_section
from tests.support.pretend_cuda import PretendDevice, unavailable
from tests.support.pretend_cuda.setting import on_device
from tests.support.pretend_cuda.world import CUDA

pytestmark = [
    pytest.mark.skipif(bool(unavailable()), reason=unavailable()),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]
SECTIONS = (
    "bandwidth",
    "parity nf4",
    "parity lora",
    "parity join",
    "parity attention",
    "parity modules",
    "parity nf4 experts",
    "nf4 experts",
    "states",
)
OVER_A_MODEL = ("graphs", "ahead", "swap")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendDevice]:
    measured = timing.events

    def once(rig: Rig, work: Callable[[], object], repeats: int = 20) -> timing.Times:
        return measured(rig, work, 1)

    for name in ("timing", "figures", "steps", "merged", "states"):
        module = importlib.import_module(f"bench.gpu.{name}")
        if hasattr(module, "events"):
            monkeypatch.setattr(module, "events", once)
    with on_device() as found:
        yield found


@pytest.mark.parametrize("names", [SECTIONS, OVER_A_MODEL], ids=["kernels", "model"])
def test_sections_run_as_on_a_gpu(device: PretendDevice, names: tuple[str, ...]) -> None:
    rig = Rig(CUDA, torch.float32, small=True)
    wanted = [section for section in gpu_suite.sections() if section.name in names]
    assert len(wanted) == len(names)
    outcomes = [run_section(rig, replace(section, seconds=1e4)) for section in wanted]
    assert {o.name: o.state for o in outcomes} == dict.fromkeys(names, "ok"), outcomes
