"""Activations against torch in fp64, in every instruction set."""

import math

import pytest
import torch
from torch.nn import functional as F

from fader_adapters.kernels import native
from fader_adapters.kernels.native import Map, activation

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "built")
WANTED = {
    Map.SILU: F.silu,
    Map.GELU: lambda x: x * torch.special.erfc(x * -math.sqrt(0.5)) / 2,
    Map.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Map.SIGMOID: torch.sigmoid,
    Map.SOFTPLUS: F.softplus,
    Map.EXP: torch.exp,
    Map.LOG: torch.log,
    Map.TANH: torch.tanh,
}
EXACT = {
    Map.GELU_TANH: lambda x: x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
    Map.SILU: lambda x: x * torch.sigmoid(x),
}
"""The same without what torch loses, even in fp64, where a value is small."""
ERROR = {Map.GELU: 4e-7, Map.TANH: 2e-7}
"""The largest relative one of those that say so."""


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


@pytest.mark.parametrize("kind", list(ERROR))
def test_gelu_and_tanh_lose_no_digits_anywhere(level, kind):
    small = torch.logspace(-30, 1, 20_000)
    x = torch.cat([torch.linspace(-12.5, 12.5, 100_001), small, -small]).view(1, -1)

    def worst(found: torch.Tensor) -> float:
        exact = WANTED[kind](x.double())
        return float(((found.double() - exact) / exact)[exact.abs() > 1e-37].abs().max())

    assert worst(activation(x, kind)) < ERROR[kind]
    assert worst(activation(x * (1 + 2**-20), kind)) > ERROR[kind], "the comparison sees nothing"


@pytest.mark.parametrize("kind", [*ERROR, Map.GELU_TANH, Map.SILU, Map.SIGMOID])
def test_bf16_is_rounded_from_the_exact_value(level, kind):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[every.abs() < 1e4].view(1, -1)
    exact = EXACT.get(kind, WANTED[kind])(x.double())
    wrong = (activation(x, kind) != exact.bfloat16()) & (exact.abs() > 1e-37)
    assert int(wrong.sum()) <= 4


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
