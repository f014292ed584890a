"""NF4 GEMM and the plain few-row GEMM against float64; rows are independent of one another."""

import pytest
import torch
from torch import Tensor

from fader_adapters.kernels import native

F32, BF16 = torch.float32, torch.bfloat16


def panels(n: int, k: int) -> native.Nf4Panels:
    q = native.quantise_nf4(torch.randn(n, k))
    assert q.absmax is not None
    return native.Nf4Panels.from_bnb(q.packed, q.absmax, n, k)


def rms(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt())


@pytest.mark.parametrize("shape", [(96, 128), (100, 192), (1, 64), (33, 320)])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 63, 133])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gemm_matches_float64(
    level: str, shape: tuple[int, int], rows: int, dtype: torch.dtype
) -> None:
    n, k = shape
    w, x, bias = panels(n, k), torch.randn(rows, k).to(dtype), torch.randn(n)
    want = x.double() @ w.dense(F32).double().T + bias.double()
    out = torch.full((rows, n), torch.nan)
    got = native.gemm(x, w, bias=bias, out=out)
    assert got is out
    limit = 2e-3 if dtype == BF16 and level == "avx512_bf16" else 5e-7
    assert rms(got, want) <= limit
    assert rms(got, want + 0.1 * want.abs().mean()) > limit


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_row_has_the_same_bits_alone_and_among_any_number(level: str, dtype: torch.dtype) -> None:
    w, x = panels(130, 256), torch.randn(133, 256).to(dtype)
    alone = torch.cat([native.gemm(x[i : i + 1], w) for i in range(133)])
    for rows in range(1, 134):
        assert torch.equal(native.gemm(x[:rows], w), alone[:rows]), rows
    assert torch.equal(native.gemm(torch.cat([x] * 3), w), torch.cat([alone] * 3))
    assert not torch.equal(native.gemm(x.flip(0), w), alone)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_result_does_not_depend_on_the_number_of_threads(level: str, dtype: torch.dtype) -> None:
    w, x, before = panels(200, 128), torch.randn(40, 128).to(dtype), torch.get_num_threads()
    got = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        got.append(native.gemm(x, w))
    torch.set_num_threads(before)
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])


def test_non_finite_rows_stay_in_their_row(level: str) -> None:
    w, x = panels(64, 128), torch.randn(20, 128).bfloat16()
    clean = native.gemm(x, w)
    x[3, 5], x[7, 1] = torch.inf, torch.nan
    dirty = native.gemm(x, w)
    others = [i for i in range(20) if i not in (3, 7)]
    assert torch.equal(dirty[others], clean[others])
    assert bool(dirty[7].isnan().all())


def test_strided_rows_and_outputs(level: str) -> None:
    w = panels(96, 128)
    wide = torch.randn(9, 300).bfloat16()
    x = wide[:, 100:228]
    out = torch.zeros(9, 200)
    native.gemm(x, w, out=out[:, 50:146])
    assert torch.equal(out[:, 50:146], native.gemm(x.contiguous(), w))
    assert not out[:, :50].any()
    assert not out[:, 146:].any()


def test_bf16_output_is_the_fp32_result_rounded_once(level: str) -> None:
    w, x = panels(96, 128), torch.randn(9, 128).bfloat16()
    exact = native.gemm(x, w)
    assert torch.equal(native.Site(w)(x), exact.bfloat16())


def test_stacked_weights_equal_the_parts_side_by_side(level: str) -> None:
    for sizes in ((64, 32, 32), (40, 7, 50)):
        dense = [torch.randn(n, 128) for n in sizes]
        parts = [(native.quantise_nf4(w), w.shape[0]) for w in dense]
        one = native.Nf4Panels.stack(
            [(q.packed, q.absmax, n) for q, n in parts if q.absmax is not None], 128
        )
        x = torch.randn(5, 128)
        apart = [
            native.gemm(x, native.Nf4Panels.from_bnb(q.packed, q.absmax, n, 128))
            for q, n in parts
            if q.absmax is not None
        ]
        assert torch.equal(native.gemm(x, one), torch.cat(apart, dim=1))


SPLITS = [(100,), (32, 64, 4), (5, 27, 60, 8), (33, 31, 36), (1,) * 100]
"""Rows of the parts that one weight is written from."""


@pytest.mark.parametrize("split", SPLITS, ids=len)
def test_weights_written_some_rows_at_a_time_are_the_same(built: None, split) -> None:
    q, plain = native.quantise_nf4(w := torch.randn(100, 128)), w.bfloat16()
    assert q.absmax is not None
    packed, absmax = q.packed.reshape(100, -1), q.absmax.reshape(100, -1)
    whole = native.Nf4Panels.from_bnb(packed, absmax, 100, 128)
    panels, plains = native.Nf4Panels.blank(100, 128), native.PlainPanels.blank(100, 128, BF16)
    asked: list[int] = []

    def parts():
        at = 0
        for rows in split:
            asked.append(at)
            part = packed[at : at + rows].clone(), absmax[at : at + rows].clone()
            yield (*part, rows)
            if (at + rows) % 32 == 0:  # stored before the next is asked for
                part[0].zero_()
            at += rows

    panels.fill(parts())
    plains.fill(plain.split(split))
    assert asked == [sum(split[:i]) for i in range(len(split))]
    assert torch.equal(panels.dense(F32), whole.dense(F32))
    assert torch.equal(plains.dense(), plain)
    ones = torch.ones(101, 128, dtype=BF16)
    for wrong in ((*split, 1), split[:-1]):
        with pytest.raises(ValueError, match="parts must have 100 rows in all"):
            native.PlainPanels.blank(100, 128, BF16).fill(ones[: sum(wrong)].split(wrong))


def test_resident_size_is_at_most_060_bytes_a_weight(built: None) -> None:
    w = panels(256, 512)
    assert w.nbytes <= 0.60 * 256 * 512


@pytest.mark.parametrize("n", [37, 64, 132])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_plain_weights_match_float64_and_rows_are_independent(
    level: str, n: int, dtype: torch.dtype
) -> None:
    w, x, bias = torch.randn(n, 192).to(dtype), torch.randn(29, 192).to(dtype), torch.randn(n)
    want = x.double() @ w.double().T + bias.double()
    packed = native.PlainPanels.pack(w)
    got = native.gemm(x, packed, bias=bias, out=torch.full((29, n), torch.nan))
    assert rms(got, want) <= 1e-6
    for rows in (1, 2, 5, 13):
        parts = [native.gemm(part, packed, bias=bias) for part in x.split(rows)]
        assert torch.equal(torch.cat(parts), got)
    assert torch.equal(native.Site(packed, bias=bias)(x), got.to(dtype))
    assert rms(native.gemm(x, packed), want) > 1e-3


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_plain_panels_hold_the_weight(built: None, dtype: torch.dtype) -> None:
    w, index = torch.randn(70, 128).to(dtype), torch.tensor([[69, 0, 31], [32, 33, 33]])
    packed = native.PlainPanels.pack(w)
    assert torch.equal(packed.dense(), w)
    assert torch.equal(packed.take(index), w[index])
    assert torch.equal(packed.rows(32, 70).dense(F32), w[32:].float())
    assert not torch.equal(packed.take(index), w[index - 1])


def test_weights_of_one_store_share_memory_and_compute_the_same(built: None) -> None:
    store, x = native.PanelStore(1 << 20), torch.randn(3, 128)
    q = native.quantise_nf4(torch.randn(96, 128))
    assert q.absmax is not None
    alone = native.Nf4Panels.from_bnb(q.packed, q.absmax, 96, 128)
    shared = [
        native.Nf4Panels.from_bnb(q.packed, q.absmax, 96, 128, store=store) for _ in range(200)
    ]
    storages = {w.panels.untyped_storage().data_ptr() for w in shared}
    assert 1 < len(storages) < 10  # chunks fill up, then a new one starts
    assert all(w.scales.data_ptr() % 64 == 0 for w in shared)
    assert all(torch.equal(native.gemm(x, w), native.gemm(x, alone)) for w in shared)
