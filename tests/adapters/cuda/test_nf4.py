"""NF4 linears against float64: the kernels as Triton's interpreter runs them, in fp32."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the kernels are written in Triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the compiled kernels here", allow_module_level=True)

from fader_adapters.errors import BaseUnsupported, KernelUnavailable
from fader_adapters.kernels.cuda import nf4
from fader_adapters.kernels.cuda import nf4_configs as configs
from fader_adapters.kernels.cuda.nf4_tiles import HALF, TILE, tile
from fader_adapters.kernels.nf4 import Nf4Weight, dense
from tests.support.nf4_weights import random_weight, rms, values

pytestmark = pytest.mark.usefixtures("poisoned_memory")
F32 = torch.float32
LIMIT = 5e-7
SHAPES = [(128, 64), (130, 192), (1, 128), (96, 1088), (257, 2048)]


@pytest.fixture
def scratch() -> nf4.Scratch:
    made = nf4.Scratch(torch.device("cpu"), 1 << 21)
    made.take(TILE, 64, F32).fill_(torch.nan)
    return made


def expect(x: torch.Tensor, weight: Nf4Weight, bias: torch.Tensor | None) -> torch.Tensor:
    y = x.double() @ values(weight).T
    return y if bias is None else y + bias.double()


def test_memory_is_poisoned() -> None:
    assert bool(torch.empty(9).isnan().all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 7, 63, pytest.param(133, marks=pytest.mark.slow)])
def test_product_matches_float64(shape: tuple[int, int], rows: int, scratch: nf4.Scratch) -> None:
    weight, x, bias = random_weight(*shape), torch.randn(rows, shape[1]), torch.randn(shape[0])
    for added in (bias, None):
        got = nf4.Nf4Linear([weight], added, scratch)(x)
        want = expect(x, weight, added)
        assert got.shape == want.shape
        assert rms(got, want) <= LIMIT
        assert rms(got, want + 0.01 * want.abs().mean()) > LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(n, k) for n in (3, 128, 200, 513) for k in (64, 1024, 4160)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 9, 16, 17, 32, 33, 64, 65, 127, 128])
def test_product_matches_float64_in_every_bucket(
    shape: tuple[int, int], rows: int, scratch: nf4.Scratch
) -> None:
    weight, x = random_weight(*shape), torch.randn(rows, shape[1])
    assert rms(nf4.Nf4Linear([weight], None, scratch)(x), expect(x, weight, None)) <= LIMIT


def test_the_sweep_has_one_and_several_splits(scratch: nf4.Scratch) -> None:
    splits = {nf4.Nf4Linear([random_weight(*s)], None, scratch).splits for s in SHAPES}
    assert splits == {1, 2, 4}


def test_planes_are_added_in_order_and_rounded_once(scratch: nf4.Scratch) -> None:
    planes = torch.randn(4, 3, 1500)
    bias, out = torch.randn(1500), torch.empty(3, 1500)
    nf4.add_planes(planes, bias, out)
    want = ((planes[0] + planes[1]) + planes[2]) + planes[3] + bias
    assert torch.equal(out, want)
    assert not torch.equal(out, planes.flip(0).cumsum(0)[-1] + bias)


@pytest.mark.parametrize("shape", [(96, 192), (130, 1024)])
def test_a_row_has_the_same_bits_alone_and_among_any_decode_rows(
    shape: tuple[int, int], scratch: nf4.Scratch
) -> None:
    linear = nf4.Nf4Linear([random_weight(*shape)], torch.randn(shape[0]), scratch)
    x = torch.randn(configs.DECODE_ROWS, shape[1])
    full = linear(x)
    for rows in (1, 2, 3, 8, 16, 17, 33):
        assert torch.equal(linear(x[-rows:]), full[-rows:]), rows
    assert not torch.equal(linear(x.flip(0)), full)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_non_finite_rows_stay_in_their_row(scratch: nf4.Scratch) -> None:
    linear = nf4.Nf4Linear([random_weight(64, 128)], None, scratch)
    x = torch.randn(20, 128)
    clean = linear(x)
    x[3, 5], x[19, 1] = torch.inf, torch.nan
    dirty = linear(x)
    others = [i for i in range(20) if i not in (3, 19)]
    assert torch.equal(dirty[others], clean[others])
    assert bool(dirty[19].isnan().all())


def test_strided_rows_and_no_rows(scratch: nf4.Scratch) -> None:
    weight = random_weight(64, 128)
    linear, wide = nf4.Nf4Linear([weight], None, scratch), torch.randn(9, 300)
    x = wide[:, 100:228]
    assert torch.equal(linear(x), linear(x.contiguous()))
    assert torch.equal(linear(wide[:, 1:257:2]), linear(wide[:, 1:257:2].contiguous()))
    assert not torch.equal(linear(wide[:, 101:229]), linear(x))
    assert linear(x[:0]).shape == (0, 64)


def test_stacked_weights_equal_the_parts_side_by_side(scratch: nf4.Scratch) -> None:
    parts = [random_weight(n, 128) for n in (40, 7, 250)]
    x = torch.randn(5, 128)
    apart = [nf4.Nf4Linear([part], None, scratch)(x) for part in parts]
    stacked = nf4.Nf4Linear(parts, None, scratch)
    assert torch.equal(stacked(x), torch.cat(apart, dim=1))
    assert torch.equal(stacked.dense(F32), torch.cat([dense(part, F32) for part in parts]))
    assert not torch.equal(stacked(x), torch.cat(apart[::-1], dim=1))


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_weights_are_the_codes_times_absmax(
    shape: tuple[int, int], scratch: nf4.Scratch
) -> None:
    weight = random_weight(*shape)
    got = nf4.Nf4Linear([weight], None, scratch).dense(F32)
    assert torch.equal(got, values(weight).float())
    assert not torch.equal(got, values(weight, bf16_codes=True).float())


def test_many_rows_pass_through_a_small_scratch_in_chunks() -> None:
    weight, bias, x = random_weight(300, 128), torch.randn(300), torch.randn(150, 128)
    small = nf4.Scratch(torch.device("cpu"), TILE * 128 * 4 + 100)
    assert small.most_rows(128, F32) == TILE
    linear = nf4.Nf4Linear([weight], bias, small)
    assert rms(linear(x), expect(x, weight, bias)) <= LIMIT
    before = small.take(1, 1, F32).data_ptr()
    linear(x)
    assert small.take(1, 1, F32).data_ptr() == before


def test_a_scratch_that_holds_no_tile_is_refused() -> None:
    linear = nf4.Nf4Linear(
        [random_weight(8, 128)], None, nf4.Scratch(torch.device("cpu"), TILE * 128 * 4 - 1)
    )
    with pytest.raises(KernelUnavailable, match="larger"):
        linear(torch.randn(150, 128))


def test_other_dtypes_than_the_kernels_pass_through_the_scratch(scratch: nf4.Scratch) -> None:
    weight = random_weight(200, 128)
    x = torch.randn(3, 128, dtype=torch.float64)
    got = nf4.Nf4Linear([weight], torch.randn(200) * 0, scratch)(x)
    assert got.dtype == torch.float64
    assert rms(got, expect(x, weight, None)) <= LIMIT


def test_resident_bytes_are_four_bits_and_the_absmax(scratch: nf4.Scratch) -> None:
    linear = nf4.Nf4Linear([random_weight(256, 512)], None, scratch)
    assert linear.nbytes == 256 * 512 * 0.5625
    assert nf4.Nf4Linear([random_weight(257, 512)], None, scratch).nbytes == 384 * 512 * 0.5625


def test_tiles_hold_both_halves_of_a_block_and_zeros_past_the_end() -> None:
    weight = random_weight(130, 128)
    tiles = tile([weight])
    nibbles = torch.stack((weight.packed >> 4, weight.packed & 15), dim=1).view(130, 2, 64)
    assert tiles.codes.shape == (2, 2, TILE, HALF)
    assert torch.equal(tiles.codes[1, :, :2] >> 4, nibbles[128:, :, :HALF].transpose(0, 1))
    assert torch.equal(tiles.codes[1, :, :2] & 15, nibbles[128:, :, HALF:].transpose(0, 1))
    assert torch.equal(tiles.scales[1, :, :2], weight.absmax.view(130, 2)[128:].T)
    assert not tiles.codes[1, :, 2:].any()
    assert not tiles.scales[1, :, 2:].any()


def test_blocks_that_would_straddle_rows_are_refused() -> None:
    with pytest.raises(BaseUnsupported, match="straddle"):
        tile([random_weight(64, 96)])


def test_a_shape_listed_for_the_scratch_never_runs_the_fused_kernel(
    monkeypatch: pytest.MonkeyPatch, scratch: nf4.Scratch
) -> None:
    weight, x, ran = random_weight(128, 128), torch.randn(2, 128), []
    linear = nf4.Nf4Linear([weight], None, scratch)
    gemm = linear._gemm
    monkeypatch.setattr(linear, "_gemm", lambda *args: (ran.append(1), gemm(*args)))
    linear(x)
    assert ran == [1]
    monkeypatch.setattr(configs, "METHODS", {(80, 128, 128): "scratch"})
    assert rms(linear(x), expect(x, weight, None)) <= LIMIT
    assert ran == [1]


def test_the_form_is_chosen_once_by_the_table(
    monkeypatch: pytest.MonkeyPatch, scratch: nf4.Scratch
) -> None:
    weight, bias, x = random_weight(192, 128), torch.randn(192), torch.randn(5, 128)
    ours = nf4.linear([weight], bias, scratch)
    assert isinstance(ours, nf4.Nf4Linear)
    monkeypatch.setattr(configs, "METHODS", {(80, 192, 128): "bitsandbytes"})
    theirs = nf4.linear([weight.rows(0, 100), weight.rows(100, 192)], bias, scratch)
    assert isinstance(theirs, nf4.BitsandbytesLinear)
    assert rms(theirs(x), expect(x, weight, bias)) <= 1e-6
    assert rms(theirs(x), ours(x)) <= 1e-6
    assert torch.equal(theirs.dense(F32), ours.dense(F32))
    assert (theirs.in_features, theirs.out_features) == (ours.in_features, ours.out_features)
    assert theirs.nbytes < ours.nbytes
    assert theirs(x[:0]).shape == (0, 192)


class Calls(TorchDispatchMode):
    """Rows of every product of bitsandbytes'."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "gemm_4bit" in func.name():
            self.rows.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("way", "size"), [("fused", 4), ("pieces", 256)])
def test_bitsandbytes_multiplies_one_number_of_rows_while_a_backend_leads(
    way: nf4.Way, size: int, scratch: nf4.Scratch
) -> None:
    """It changes kernels by that number, and a row's bits with them."""
    weight, bias, x = random_weight(128, 64), torch.randn(128), torch.randn(5, 64)
    linear = nf4.BitsandbytesLinear([weight], bias, scratch)
    for scratch.way, sizes in ((way, {size}), ("rows", {1, 5})):
        with Calls() as calls:
            alone, together = linear(x[3:4]), linear(x)
        assert {*calls.rows} == sizes
        assert rms(together, expect(x, weight, bias)) <= 1e-6
        assert alone.shape == (1, 128)
        if scratch.way == way:
            assert torch.equal(alone[0], together[3])
    assert linear(x[:0]).shape == (0, 128)
