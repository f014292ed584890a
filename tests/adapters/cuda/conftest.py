"""Without a GPU the kernels of this folder run in Triton's interpreter, in float32 on the CPU."""

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.support.pretend_cuda import PretendDevice

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    # Triton decides at its import which kind of function it makes; an earlier import was without.
    # Its library stays: what that is made of is there only once.
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        if not name.startswith("triton._C"):
            del sys.modules[name]


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every fresh tensor holds NaN: outputs, planes and scratch."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> "Iterator[PretendDevice]":
    """A pretended one, what it notices being the test's to expect."""
    from tests.support.pretend_cuda import pretend

    with pretend() as found:
        yield found
        found.notices.told.clear()
