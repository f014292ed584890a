"""Routers of mixtures on the CUDA backend: a row's bits in any company."""

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_adapters.kernels.cuda import dense
from fader_adapters.kernels.cuda.backend import CudaBackend

CPU = torch.device("cpu")


@pytest.mark.parametrize("way", ["fused", "pieces", "rows"])
def test_routers_multiply_one_number_of_rows_whatever_a_step_holds(monkeypatch, way: str) -> None:
    """Which the vendor's products cut their sums by; in a notebook, where nobody leads the steps,
    it is all rows."""
    backend, seen, linear = CudaBackend(CPU, torch.float32, arch=90), [], dense.F.linear
    backend._scratch.way = way
    monkeypatch.setattr(dense.F, "linear", lambda x, *rest: seen.append(len(x)) or linear(x, *rest))
    weight, bias = torch.randn(8, 64), torch.randn(8)
    for rows in (1, 63, 64, 130):
        x = torch.randn(1, rows, 64)
        y = backend.router()(x, weight, bias)
        torch.testing.assert_close(y, x @ weight.T + bias)
        if way != "rows":
            assert torch.equal(backend.router()(x[:, -1:], weight, bias), y[:, -1:])
    assert set(seen) == ({64} if way != "rows" else {1})
