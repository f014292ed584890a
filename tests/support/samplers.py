"""Every sampler of a test reads logits by tensors, then by native kernels."""

import pytest

from fader_adapters.kernels import native
from fader_server.model.distribution import NativeDistributions, TorchDistributions

KINDS = (TorchDistributions, NativeDistributions)


@pytest.fixture(params=KINDS, autouse=True)
def distributions(request, monkeypatch):
    """What `Sampler()` takes."""
    if request.param is NativeDistributions and not native.available():
        pytest.skip(native.reason())
    monkeypatch.setattr("fader_server.model.sampler.TorchDistributions", request.param)
    return request.param
