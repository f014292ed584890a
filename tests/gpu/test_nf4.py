"""NF4 linears on a GPU in bf16 against float64: what no interpreter shows (the PTX lookup, the
pipeline, the matrix units, addresses past 2³¹)."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton")

from fader_adapters.kernels.cuda import nf4
from fader_adapters.kernels.cuda import nf4_configs as configs
from fader_adapters.kernels.nf4 import Nf4Weight
from tests.support.nf4_weights import random_weight, rms, values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

BF16 = torch.bfloat16
SHAPES = [(128, 64), (200, 1024), (1024, 4096), (4096, 4096), (6144, 4096), (1000, 14336)]
ROWS = [1, 2, 3, 4, 7, 8, 9, 16, 17, 32, 33, 63, 64, 65, 128, 133, 300]

FUSED_LIMIT = 3e-3
"""Codes and results rounded to bf16 once each: 1.3e-3 and 1.7e-3, added as squares, and slack."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def scratch() -> nf4.Scratch:
    return nf4.Scratch(torch.device("cuda"))


def fused(linear: nf4.Nf4Linear, x: torch.Tensor) -> torch.Tensor:
    """The fused kernel's result in a poisoned output."""
    out = torch.full((x.shape[0], linear.out_features), torch.nan, dtype=BF16, device="cuda")
    return linear.fused(x, out)


def inputs(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width).to("cuda", BF16)


@pytest.mark.parametrize("shape", SHAPES)
def test_product_matches_float64(shape: tuple[int, int], scratch: nf4.Scratch) -> None:
    weight = random_weight(*shape, device="cuda")
    bias = torch.randn(shape[0]).to("cuda", BF16)
    dense, rounded = values(weight).cuda(), values(weight, bf16_codes=True).cuda()
    for added in (bias, None):
        linear = nf4.Nf4Linear([weight], added, scratch)
        for rows in ROWS:
            x = inputs(rows, shape[1])
            shift = 0 if added is None else added.double()
            want = x.double() @ dense.T + shift
            got = linear(x)
            assert got.dtype == BF16
            assert rms(got, want) <= FUSED_LIMIT, rows
            assert rms(got, want + 0.01 * want.abs().mean()) > FUSED_LIMIT
            if rows <= configs.FUSED_ROWS:
                exact = x.double() @ rounded.T + shift
                assert rms(fused(linear, x), exact.to(BF16)) <= 2e-4, rows


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_alone_and_among_any_decode_rows(
    shape: tuple[int, int], scratch: nf4.Scratch
) -> None:
    linear = nf4.Nf4Linear([random_weight(*shape, device="cuda")], None, scratch)
    x = inputs(configs.DECODE_ROWS, shape[1])
    full = linear(x)
    for rows in range(1, configs.DECODE_ROWS):
        assert torch.equal(linear(x[-rows:]), full[-rows:]), rows
    assert not torch.equal(linear(x.flip(0)), full)


def test_results_repeat_bit_for_bit(scratch: nf4.Scratch) -> None:
    linear = nf4.Nf4Linear([random_weight(4096, 4096, device="cuda")], None, scratch)
    assert linear.splits > 1
    x = inputs(13, 4096)
    first = linear(x)
    assert all(torch.equal(linear(x), first) for _ in range(50))
    assert not torch.equal(linear(x * 1.1), first)


def test_non_finite_rows_stay_in_their_row(scratch: nf4.Scratch) -> None:
    linear = nf4.Nf4Linear([random_weight(1024, 1024, device="cuda")], None, scratch)
    x = inputs(20, 1024)
    clean = linear(x)
    x[3, 5], x[19, 1] = torch.inf, torch.nan
    dirty = linear(x)
    others = [i for i in range(20) if i not in (3, 19)]
    assert torch.equal(dirty[others], clean[others])
    assert bool(dirty[19].isnan().all())


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_dense_weights_are_rounded_once(dtype: torch.dtype, scratch: nf4.Scratch) -> None:
    weight = random_weight(300, 4096, device="cuda")
    got = nf4.Nf4Linear([weight], None, scratch).dense(dtype)
    want = values(weight).float().to(dtype).cuda()
    assert torch.equal(got, want)
    assert not torch.equal(got.float(), values(weight, bf16_codes=True).float().cuda())


@pytest.mark.parametrize("rows", [1, 16, 64, 200])
def test_a_captured_graph_reads_its_input_anew(rows: int, scratch: nf4.Scratch) -> None:
    linear = nf4.Nf4Linear([random_weight(4096, 4096, device="cuda")], None, scratch)
    x = inputs(rows, 4096)
    linear(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x)
    before = y.clone()
    x.copy_(inputs(rows, 4096))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, linear(x))
    assert not torch.equal(y, before)


def test_weights_of_more_than_two_to_the_31_bytes_are_addressed(scratch: nf4.Scratch) -> None:
    rows, width = 1 << 20, 4224
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    packed = torch.randint(0, 256, (rows * width // 2,), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(rows * width // 64, device="cuda") + 0.5
    weight = Nf4Weight(packed, absmax, rows, width)
    linear = nf4.Nf4Linear([weight], None, scratch)
    assert linear.tiles.codes.nbytes > 2**31
    end = Nf4Weight(packed[-width * 64 :], absmax[-width * 2 :], 128, width)
    x = inputs(3, width)
    got = linear(x)[:, -128:]
    want = x.double() @ values(end).cuda().T
    assert rms(got, want) <= FUSED_LIMIT
    assert rms(got.flip(1), want) > FUSED_LIMIT


def test_scratch_result_agrees_with_the_fused_one() -> None:
    scratch = nf4.Scratch(torch.device("cuda"), 64 << 20)  # several chunks
    linear = nf4.Nf4Linear([random_weight(28672, 4096, device="cuda")], None, scratch)
    x = inputs(64, 4096)
    assert scratch.most_rows(4096, BF16) < 28672
    out = torch.full((64, 28672), torch.nan, dtype=BF16, device="cuda")
    assert rms(linear.through_scratch(x, out), linear(x)) <= 2 * FUSED_LIMIT
    assert rms(linear.through_scratch(x.flip(0), out), linear(x)) > 2 * FUSED_LIMIT


def test_bitsandbytes_agrees(scratch: nf4.Scratch) -> None:
    weight = random_weight(1024, 4096, device="cuda")
    theirs, ours = nf4.BitsandbytesLinear([weight], None), nf4.Nf4Linear([weight], None, scratch)
    for rows in (1, 16, 200):
        x = inputs(rows, 4096)
        assert rms(theirs(x), ours(x)) <= 2 * FUSED_LIMIT
        assert rms(theirs(x.flip(1)), ours(x)) > 2 * FUSED_LIMIT
