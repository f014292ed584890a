"""Activations against torch in fp64, in every instruction set."""

import pytest
import torch
from torch.nn import functional as F

from fader_adapters.kernels import native
from fader_adapters.kernels.native import Map, activation

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "built")
WANTED = {
    Map.SILU: F.silu,
    Map.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Map.SIGMOID: torch.sigmoid,
    Map.SOFTPLUS: F.softplus,
    Map.EXP: torch.exp,
    Map.LOG: torch.log,
}


@pytest.mark.parametrize("kind", list(WANTED))
def test_activation_equals_the_formula(level, kind):
    assert native.isa() == level
    x = torch.randn(7, 133).mul_(6)
    x = x.abs() + 1e-3 if kind == Map.LOG else x
    expected = WANTED[kind](x.double())
    assert torch.allclose(activation(x, kind).double(), expected, atol=1e-6, rtol=1e-5)
    rounded = activation(x.bfloat16(), kind).double()
    assert torch.allclose(rounded, WANTED[kind](x.bfloat16().double()), atol=1e-6, rtol=2**-7)
    assert not torch.allclose(activation(x, kind).double(), expected + 1e-3, atol=1e-6)


def test_an_element_has_the_same_bits_in_the_tail_and_in_strided_rows():
    x = torch.randn(3, 40)
    whole = activation(x, Map.SILU)
    assert torch.equal(activation(x[:, :7], Map.SILU), whole[:, :7])
    assert torch.equal(activation(x[:, 7:].contiguous(), Map.SILU), whole[:, 7:])


@pytest.mark.parametrize("kind", list(WANTED))
def test_extremes_are_those_of_the_formula(level, kind):
    x = torch.tensor([[-1e4, -90.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 80.0, float("nan")]])
    found, expected = activation(x, kind).double(), WANTED[kind](x.double())
    close = torch.isclose(found, expected, atol=1e-30, rtol=2e-6, equal_nan=True)
    assert close.all(), x[~close]


def test_other_maps_and_types_are_refused():
    with pytest.raises(ValueError, match="kind"):
        activation(torch.ones(1, 1), Map.ADD)
    with pytest.raises(TypeError, match="x must be"):
        activation(torch.ones(1, 1, dtype=torch.float64), Map.SILU)
