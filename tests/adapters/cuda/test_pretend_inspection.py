"""Inspecting an adapter beside streams on a GPU."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_adapters.inspection import Inspector
from fader_adapters.spec import BaseSpec, Digest, LinearSpec
from tests.support.pretend_cuda import pretend, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())


class Weights:
    """One linear in four panels on the device."""

    def __init__(self) -> None:
        self.whole = torch.arange(32, device="cuda").view(8, 4).float()

    def panels(self, linear: int) -> Iterator[torch.Tensor]:
        yield from self.whole.split(2)


def test_the_norm_of_a_linear_is_waited_for_once() -> None:
    base = BaseSpec((LinearSpec("q_proj", 4, 8, 0),), Digest("0" * 64), "base")
    with pretend() as device:
        inspector = Inspector(base, dtype=torch.float32, weights=Weights())
        norm = inspector._norm(0)
        assert device.waits.total() == 1
        assert norm == pytest.approx(float(torch.arange(32).float().norm()))
        assert inspector._norm(0) == norm
        assert device.waits.total() == 1
