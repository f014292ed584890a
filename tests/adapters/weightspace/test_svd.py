import pytest
import torch

from fader_adapters.weightspace import svd


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decaying(out: int, width: int, *, power: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix with σᵢ = i^−power and those σ, in fp64."""
    small = min(out, width)
    u, _ = torch.linalg.qr(random(out, small, seed=1).double())
    v, _ = torch.linalg.qr(random(width, small, seed=2).double())
    sigma = torch.arange(1, small + 1, dtype=torch.float64) ** -power
    return ((u * sigma) @ v.T).float(), sigma


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (700, 650)])
def test_recovers_a_planted_delta(exact, shape):
    planted = random(shape[0], 5) @ random(5, shape[1], seed=1)
    found = svd.truncate(planted, 5, exact=exact)
    assert found.rank == 5
    assert torch.linalg.norm(found.b @ found.a - planted) <= 1e-5 * torch.linalg.norm(planted)
    assert found.error <= 1e-5 * found.norm
    short = svd.truncate(planted, 4, exact=exact)  # one direction too few must show
    assert short.error > 1e-2 * short.norm


@pytest.mark.parametrize("rank", [1, 7, 40])
def test_error_is_the_tail_of_the_singular_values(rank):
    delta, sigma = decaying(96, 64, power=1.0)
    found = svd.truncate(delta, rank, exact=True)
    tail = float(torch.linalg.vector_norm(sigma[rank:]))
    assert found.error == pytest.approx(tail, rel=1e-4)
    assert found.error != pytest.approx(float(torch.linalg.vector_norm(sigma[rank + 1 :])), 1e-4)
    assert found.singular == pytest.approx(sigma[:rank].tolist(), rel=1e-4)
    assert float(torch.linalg.norm(delta - found.b @ found.a)) == pytest.approx(tail, rel=1e-4)


@pytest.mark.parametrize("power", [0.3, 1.0])
def test_random_projection_is_nearly_the_best_even_for_a_flat_spectrum(power):
    delta, sigma = decaying(640, 600, power=power)
    found = svd.truncate(delta, 16, exact=False)
    assert found.error == pytest.approx(float(torch.linalg.vector_norm(sigma[16:])), rel=2e-3)
    again = svd.truncate(delta, 16, exact=False)
    assert torch.equal(found.a, again.a)
    assert not torch.equal(found.a, svd.truncate(delta, 16, exact=False, seed=1).a)


def test_product_is_truncated_without_forming_it_and_with_the_same_result():
    b, a = random(96, 24), random(24, 64, seed=1)
    found = svd.truncate_product(b, a, 6)
    sigma = torch.linalg.svdvals(b.double() @ a.double())
    assert found.singular == pytest.approx(sigma[:6].tolist(), rel=1e-10)
    assert found.error == pytest.approx(float(torch.linalg.vector_norm(sigma[6:])), rel=1e-10)
    direct = svd.truncate(b @ a, 6, exact=True)
    torch.testing.assert_close(found.b @ found.a, direct.b @ direct.a, rtol=1e-4, atol=1e-4)
    assert float(torch.linalg.norm(b @ a - found.b @ found.a)) == pytest.approx(
        found.error, rel=1e-4
    )


@pytest.mark.parametrize("shape", [(8, 40), (40, 8)])
def test_rank_beyond_the_matrix_gives_all_of_it(shape):
    delta = random(*shape)
    for found in (
        svd.truncate(delta, 30),
        svd.truncate(delta, 30, exact=False),
        svd.truncate_product(delta @ random(shape[1], 50, seed=3), random(50, shape[1]), 30),
    ):
        assert found.rank == 8
        assert found.error <= 1e-5 * found.norm


def test_directions_that_are_only_rounding_are_left_out():
    b, a = random(64, 3), random(3, 48, seed=1)
    assert svd.truncate_product(torch.cat([b, b], 1), torch.cat([a, a]), 6).rank == 3
