"""Runs each kernel test on every instruction set of this machine; skips when the library is not
built."""

from collections.abc import Iterator

import pytest
import torch

from fader_adapters.kernels import native


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=native.LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set in use during the test."""
    if not native.available():
        pytest.skip(native.reason())
    before = native.isa()
    if native.LEVELS.index(request.param) > native.LEVELS.index(native.best_isa()):
        pytest.skip(f"this machine has {native.best_isa()}, not {request.param}")
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture
def built() -> None:
    """Skip without the library."""
    if not native.available():
        pytest.skip(native.reason())
