"""A weight times a step's tokens, as columns: each column has the same bits in any company."""

import pytest
import torch

from fader_server.model.products import SteadyProducts

OUT, WIDTH = 192, 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_column_has_the_bits_that_it_has_alone(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, WIDTH, generator=generator).to(dtype)
    rows = torch.randn(1, 70, 3 * WIDTH, generator=generator).to(dtype)[..., :WIDTH]
    with SteadyProducts(None):
        alone = [weight @ rows[:, i : i + 1].transpose(1, 2) for i in range(70)]
        for n in (2, 9, 33, 70):
            found = weight @ rows[:, :n].transpose(1, 2)
            assert found.shape == (1, OUT, n)
            assert torch.equal(found, torch.cat(alone[:n], dim=-1))
    torch.testing.assert_close(
        torch.cat(alone, dim=-1).double(),
        weight.double() @ rows.double().transpose(1, 2),
        atol=1e-4 if dtype == torch.float32 else 0.2, rtol=1e-2,
    )  # fmt: skip


def test_other_products_are_torchs_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fader_server.model.products.linear", lambda x, w: 1 / 0)
    a, b = torch.randn(4, 3), torch.randn(3, 5)
    with SteadyProducts(None):
        assert torch.equal(a @ b, torch.mm(a, b))
        assert (b[None].mT @ a[None].mT).shape == (1, 5, 4)
        with pytest.raises(ZeroDivisionError):
            a @ b[None]
