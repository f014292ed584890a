"""Quantisation that keeps directions: the kernel against torch, and against the plain quantiser."""

import pytest
import torch

from fader_adapters import rounding
from fader_adapters.kernels import native, nf4


def case(n: int, width: int, rank: int) -> tuple[torch.Tensor, rounding.Keep]:
    """A weight on the NF4 grid plus a delta of 2 % of its norm, and what to keep of it."""
    a = torch.randn(rank, width)
    grid = nf4.dense(rounding.quantise(torch.randn(n, width), None), torch.float32)
    wanted = grid + 0.02 * torch.randn(n, rank) @ a / rank**0.5
    return wanted, rounding.Keep.of(rounding.directions(a), grid, wanted)


def _objective(wanted: torch.Tensor, made: nf4.Nf4Weight, kept: rounding.Keep) -> float:
    error = nf4.dense(made, torch.float32) - wanted
    along = (error @ kept.directions).square().sum()
    return float(error.square().sum() + kept.strength * along)


@pytest.mark.parametrize("shape", [(1, 64), (15, 128), (16, 192), (33, 320), (100, 256)])
@pytest.mark.parametrize("rank", [1, 8, 17, 64])
def test_the_kernel_is_the_specification_in_torch(level: str, shape, rank):
    wanted, kept = case(*shape, rank)
    got, expected = rounding.quantise(wanted, kept), rounding._quantise(wanted, kept)
    assert torch.equal(got.absmax, expected.absmax)
    # sums in another order may turn a tie; then what both minimise is all but the same
    assert float((got.packed == expected.packed).float().mean()) > 0.995
    value = _objective(wanted, expected, kept)
    assert _objective(wanted, got, kept) == pytest.approx(value, rel=1e-2)


def test_it_keeps_what_plain_rounding_loses(level: str):
    wanted, kept = case(64, 512, 8)
    plain, keep = rounding.quantise(wanted, None), rounding.quantise(wanted, kept)
    along = [
        float(((nf4.dense(made, torch.float32) - wanted) @ kept.directions).norm())
        for made in (plain, keep)
    ]
    assert along[1] < 0.5 * along[0]
    assert torch.equal(plain.absmax, keep.absmax), "same scales: same size and speed"


def test_without_strength_it_is_the_plain_quantiser(level: str):
    wanted, kept = case(40, 256, 8)
    plain = native.quantise_nf4(wanted)
    assert torch.equal(
        native.quantise_keeping(wanted, kept.directions, strength=0.0).packed, plain.packed
    )
    strong = native.quantise_keeping(wanted, kept.directions, strength=16.0).packed
    assert not torch.equal(strong, plain.packed)


def test_rows_do_not_know_their_company(level: str):
    wanted, kept = case(40, 256, 8)
    whole = nf4.dense(rounding.quantise(wanted, kept), torch.float32)
    part = nf4.dense(rounding.quantise(wanted[7:30].contiguous(), kept), torch.float32)
    assert torch.equal(whole[7:30], part)


@pytest.mark.parametrize("bad", ["nan", "inf", "width", "directions", "dtype", "strength"])
def test_bad_input_is_refused(level: str, bad: str):
    wanted, kept, strength = torch.randn(8, 128), torch.randn(128, 4), 1.0
    if bad in ("nan", "inf"):
        wanted[3, 70] = float(bad)
    elif bad == "width":
        wanted, kept = torch.randn(8, 96), torch.randn(96, 4)
    elif bad == "directions":
        kept = torch.randn(4, 128)
    elif bad == "dtype":
        wanted = wanted.bfloat16()
    else:
        strength = float("nan")
    with pytest.raises((ValueError, TypeError)):
        native.quantise_keeping(wanted, kept, strength=strength)


def test_blocks_of_zeros_stay_zero(level: str):
    wanted, kept = case(20, 192, 4)
    wanted[:, 64:128] = 0
    made = rounding.quantise(wanted, kept)
    assert not nf4.dense(made, torch.float32)[:, 64:128].any()


def test_the_smaller_a_delta_the_more_it_counts():
    basis, weight = torch.eye(64)[:, :2], torch.ones(4, 64)
    strengths = [
        rounding.Keep.of(basis, weight, weight * (1 + part)).strength
        for part in (2.0, 0.1, 0.01, 1e-6, 0.0)
    ]
    assert strengths == pytest.approx([1.0, 10.0, 100.0, 256.0, 1.0], rel=1e-3)
