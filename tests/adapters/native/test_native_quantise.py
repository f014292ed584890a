"""The quantiser against bitsandbytes, bit for bit, and against its own inverse."""

import pytest
import torch

from fader_adapters.kernels import native

bnb = pytest.importorskip("bitsandbytes.functional")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    w = torch.randn(shape) * torch.rand(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    flat = w.view(-1)
    flat[:64] = 0  # a block of zeros
    flat[64:128] *= 1e-30 if dtype == torch.float32 else 1e-3
    return w.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96, 128), (33, 320), (7, 30), (5, 13), (300, 256)])
def test_codes_and_absmax_equal_bitsandbytes(
    level: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    w = weights(shape, dtype)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", blocksize=64)
    got = native.quantise_nf4(w)
    assert torch.equal(got.packed, packed)
    assert got.absmax is not None
    assert torch.equal(got.absmax, state.absmax)
    w.view(-1)[-1] *= -1
    assert not torch.equal(native.quantise_nf4(w).packed, packed)


def test_values_on_the_midpoints_equal_bitsandbytes(level: str) -> None:
    code = bnb.get_4bit_type("nf4", device="cpu")
    middle = (code[:-1] + code[1:]) / 2
    near = [middle, middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0)), code]
    row = torch.cat(near)
    w = torch.cat([row, torch.ones(128 - row.numel())]).repeat(4, 1)
    packed, _ = bnb.quantize_4bit(w, quant_type="nf4", blocksize=64)
    assert torch.equal(native.quantise_nf4(w).packed, packed)


def test_scales_that_are_all_their_mean_come_back(level: str) -> None:
    w = torch.ones(300, 256)
    got = native.quantise_nf4(w, nested=True)
    assert got.nested is not None
    assert not got.nested.absmax.any(), "the case in question"
    assert torch.equal(native.dequantise_absmax(got.nested), torch.ones(300 * 4))


@pytest.mark.parametrize("shape", [(96, 128), (300, 256), (1000, 64), (3, 64)])
def test_double_quantisation_equals_bitsandbytes(level: str, shape: tuple[int, int]) -> None:
    w = weights(shape, torch.bfloat16)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", blocksize=64, compress_statistics=True)
    got = native.quantise_nf4(w, nested=True)
    assert got.nested is not None
    assert torch.equal(got.packed, packed)
    assert torch.equal(got.nested.codes, state.absmax)
    assert torch.equal(got.nested.absmax, state.state2.absmax)
    assert torch.equal(got.nested.map, state.state2.code)
    assert got.nested.offset == float(state.offset)
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(native.dequantise_absmax(got.nested), absmax)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 128), (7, 30), (33, 320)])
def test_dequantised_weights_equal_bitsandbytes(
    level: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    packed, state = bnb.quantize_4bit(weights(shape, dtype), quant_type="nf4", blocksize=64)
    want = bnb.dequantize_4bit(packed, state)
    assert torch.equal(native.dequantise_nf4(packed, state.absmax, shape, dtype), want)
    if shape[1] % 64 == 0:
        panels = native.Nf4Panels.from_bnb(packed, state.absmax, *shape)
        assert torch.equal(panels.dense(dtype), want)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_weights_are_refused(level: str, bad: float) -> None:
    w = torch.randn(4, 64)
    w[2, 3] = bad
    with pytest.raises(ValueError, match="weight must be finite"):
        native.quantise_nf4(w)
