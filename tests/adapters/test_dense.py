"""Products on a CPU: a row's bits are its own, whoever else is in the call."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from fader_adapters.kernels.dense import BLOCK, linear

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
COUNTS = (1, 2, 3, 4, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK)
SHAPES = [(64, 1), (64, 96), (100, 37), (256, 512), (1024, 256)]


def _strays(product: Product, shape: tuple[int, int], dtype: torch.dtype) -> list[int]:
    """The numbers of rows at which some row's bits are not those it has among all rows."""
    width, out = shape
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(out, width, generator=generator).to(dtype)
    x = torch.randn(max(COUNTS), width, generator=generator).to(dtype)
    order = torch.randperm(len(x), generator=generator)
    whole = product(x, weight)
    found = [n for n in COUNTS if not torch.equal(product(x[:n], weight), whole[:n])]
    return found if torch.equal(product(x[order], weight), whole[order]) else [*found, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_in_any_company(shape, dtype):
    assert _strays(linear, shape, dtype) == []


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_in_an_order_of_the_number_of_rows_is_noticed(shape):
    def split(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        at = 32 if len(x) < BLOCK else 16
        return F.linear(x[:, :at], weight[:, :at]) + F.linear(x[:, at:], weight[:, at:])

    assert _strays(split, shape, torch.float32)


@pytest.mark.parametrize("count", COUNTS)
def test_products_equal_fp64(count):
    x, weight, bias = torch.randn(count, 64), torch.randn(24, 64), torch.randn(24)
    exact = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(linear(x, weight, bias).double(), exact, rtol=0, atol=1e-4)
    assert linear(x[:0], weight, bias).shape == (0, 24)
