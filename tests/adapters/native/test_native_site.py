"""The batched delta and the fused site: against float64, row by row, and with other people's bad
numbers near."""

import itertools

import pytest
import torch

from fader_adapters.kernels import native
from tests.adapters.native.native_sites import Blend, Case, make, plan_of, reference

F32, BF16 = torch.float32, torch.bfloat16
RANKS = [1, 8, 16, 64, 3, 16, 24, 8]
DTYPES = list(itertools.product([F32, BF16], [F32, BF16]))


def batches(total: int) -> dict[str, tuple[list[Blend], list[int]]]:
    """Blends and tokens of each row for `total` tokens."""
    decode = [1] * total
    distinct: list[Blend] = [[(i % 8, 1.0 - 0.1 * (i % 5))] for i in range(total)]
    mixed: list[Blend] = [
        [
            [],
            [(2, 1.0)],
            [(3, -0.5), (0, 2.0)],
            [(1, 0.0), (7, 1.0)],
            [(6, 0.3), (4, 0.3), (2, 0.4)],
        ][i % 5]
        for i in range(total)
    ]
    out: dict[str, tuple[list[Blend], list[int]]] = {
        "base only": ([[]] * total, decode),
        "one adapter": ([[(2, 1.0)]], [total]),
        "all distinct": (distinct, decode),
        "mixed": (mixed, decode),
    }
    if total > 1:
        out["skewed"] = ([[(5, 1.0)], [(3, -1.5), (5, 0.5)]], [1, total - 1])
    return out


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool(((got.double() - want).abs() <= 3e-6 * (1 + want.abs().max())).all())


@pytest.mark.parametrize(("x_dtype", "arena_dtype"), DTYPES)
@pytest.mark.parametrize("total", [1, 7, 63, 133])
def test_delta_matches_float64(
    level: str, total: int, x_dtype: torch.dtype, arena_dtype: torch.dtype
) -> None:
    case = make(RANKS, [72, 33, 64], 128, arena_dtype, skip={(2, 1), (4, 0)})
    x = torch.randn(total, 128).to(x_dtype)
    for name, (blends, tokens) in batches(total).items():
        y = torch.randn(total, case.n)
        want = y.double() + reference(case, x, blends, tokens)
        touched = not torch.equal(want, y.double())
        wrong = close(y, want)
        native.delta(y, x, case.tables, plan_of(blends, tokens, 8))
        assert close(y, want), name
        assert touched != wrong, f"{name}: the check could not fail"


@pytest.mark.parametrize("x_dtype", [F32, BF16])
@pytest.mark.parametrize("total", [1, 7, 63, 133, 300])
def test_site_equals_gemm_then_delta_then_one_rounding(
    level: str, total: int, x_dtype: torch.dtype
) -> None:
    case, base = with_base()
    bias = torch.randn(case.n)
    workspace = native.Workspace(1 << 22)
    site = native.Site(base, case.tables, bias=None, workspace=workspace)
    biased = native.Site(base, case.tables, bias=bias, workspace=workspace)
    x = torch.randn(total, case.k).to(x_dtype)
    for blends, tokens in batches(total).values():
        plan = plan_of(blends, tokens, 8)
        want = native.delta(native.gemm(x, base), x, case.tables, plan)
        workspace.poison()
        got = site(x, plan, out=torch.full((total, case.n), torch.nan))
        assert torch.equal(got, want)
        workspace.poison()
        out = torch.full((total, case.n), torch.nan, dtype=BF16)
        assert torch.equal(biased(x, plan, out=out), (want + bias).bfloat16())


def with_base(arena: torch.dtype = BF16) -> tuple[Case, native.Nf4Panels]:
    case = make(RANKS, [160, 64, 66], 128, arena, skip={(2, 1)})
    q = native.quantise_nf4(torch.randn(case.n, case.k))
    assert q.absmax is not None
    return case, native.Nf4Panels.from_bnb(q.packed, q.absmax, case.n, case.k)


@pytest.mark.parametrize("x_dtype", [F32, BF16])
def test_a_row_has_the_same_bits_alone_and_in_a_mixed_batch(
    level: str, x_dtype: torch.dtype
) -> None:
    case, base = with_base()
    site = native.Site(base, case.tables)
    blends: list[Blend] = [
        [],
        [(2, 1.0)],
        [(3, -0.5), (0, 2.0)],
        [(5, 1.0)],
        [(2, 1.0)],
        [(0, 1.0), (3, 1.0)],
    ]
    tokens = [1, 3, 70, 2, 1, 80]
    x = torch.randn(sum(tokens), case.k).to(x_dtype)
    together = site(x, plan_of(blends, tokens, 8))
    at = 0
    for blend, count in zip(blends, tokens, strict=True):
        alone = site(x[at : at + count], plan_of([blend], [count], 8))
        assert torch.equal(together[at : at + count], alone)
        for i in range(at, at + count, 9):
            assert torch.equal(together[i : i + 1], site(x[i : i + 1], plan_of([blend], [1], 8)))
        at += count
    swapped = site(x, plan_of([*blends[:2], [(0, 2.0), (3, -0.4)], *blends[3:]], tokens, 8))
    assert not torch.equal(swapped, together)


def test_rows_need_not_stand_together(level: str) -> None:
    case, base = with_base()
    site = native.Site(base, case.tables)
    blends: list[Blend] = [[(2, 1.0)], [(5, 0.5), (1, 1.0)], []]
    order = [0, 1, 2, 1, 0, 0, 2, 1, 1]
    x = torch.randn(len(order), case.k)
    got = site(x, native.StepPlan.of(blends, order, slots=8))
    for i, row in enumerate(order):
        assert torch.equal(got[i : i + 1], site(x[i : i + 1], plan_of([blends[row]], [1], 8)))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_bad_numbers_of_one_adapter_reach_no_other_row(level: str, bad: float) -> None:
    case, base = with_base()
    blends: list[Blend] = [[(2, 1.0)], [(3, 1.0)], [(3, 0.0), (2, 1.0)], []]
    plan, x = plan_of(blends, [2, 3, 2, 1], 8), torch.randn(8, case.k)
    site = native.Site(base, case.tables)
    clean = site(x, plan)
    for m in range(3):
        for off in (case.tables.a_off[3, m], case.tables.b_off[3, m]):
            case.tables.arena[int(off)] = bad
    for slot in (0, 1, 4):  # nobody names these
        case.tables.a_off[slot] = 1 << 60
    dirty = site(x, plan)
    others = [0, 1, 5, 6, 7]
    assert torch.equal(dirty[others], clean[others])
    assert not bool(dirty[2:5].isfinite().all())


def test_the_step_without_terms_leaves_y_alone(level: str) -> None:
    case = make(RANKS, [64], 128, F32)
    y = torch.randn(3, 64)
    before = y.clone()
    plan = plan_of([[], [(1, 0.0)]], [2, 1], 8)
    assert not plan.active
    native.delta(y, torch.full((3, 128), torch.nan), case.tables, plan)
    assert torch.equal(y, before)


@pytest.mark.parametrize("k", [40, 65])
def test_any_input_width_works_for_a_delta_alone(level: str, k: int) -> None:
    case = make([4, 5], [31], k, BF16)
    x, y = torch.randn(6, k).bfloat16(), torch.zeros(6, 31)
    blends: list[Blend] = [[(0, 1.0)], [(1, 2.0), (0, 1.0)]]
    native.delta(y, x, case.tables, plan_of(blends, [2, 4], 2))
    assert close(y, reference(case, x, blends, [2, 4]))


def test_long_prefill_is_cut_in_chunks_with_the_same_bits(level: str) -> None:
    case, base = with_base()
    site = native.Site(base, case.tables)
    x, blend = torch.randn(500, case.k).bfloat16(), [(3, 1.0), (2, -1.0)]
    whole = site(x, plan_of([blend], [500], 8))
    parts = [site(x[i : i + 125], plan_of([blend], [125], 8)) for i in range(0, 500, 125)]
    assert torch.equal(whole, torch.cat(parts))
