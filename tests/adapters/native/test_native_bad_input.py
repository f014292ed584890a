"""Wrong arguments raise an error that names the argument; none of them may crash the process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fader_adapters.kernels import native
from fader_adapters.kernels.native.library import library
from tests.adapters.native.native_sites import make, plan_of

F32, BF16, I32 = torch.float32, torch.bfloat16, torch.int32


def weight(n: int = 64, k: int = 128) -> native.Nf4Panels:
    q = native.quantise_nf4(torch.randn(n, k))
    assert q.absmax is not None
    return native.Nf4Panels.from_bnb(q.packed, q.absmax, n, k)


def plain(dtype: torch.dtype = torch.float32) -> native.PlainPanels:
    return native.PlainPanels.pack(torch.zeros(4, 64, dtype=dtype))


def attention(**change: Any) -> torch.Tensor:
    """A valid call of paged_attention, but for `change`."""
    good: dict[str, Any] = {
        "q": torch.randn(2, 4, 32),
        "k_cache": torch.zeros(3, 4, 2, 32),
        "v_cache": torch.zeros(3, 4, 2, 32),
        "q_start": torch.tensor([0, 1, 2], dtype=I32),
        "context": torch.tensor([3, 4], dtype=I32),
        "block_tables": torch.tensor([[0], [1]], dtype=I32),
        "scale": 0.1,
    }
    good.update(change)
    return native.paged_attention(**good)


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=I32)


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "x no tensor": (lambda: native.gemm([1.0], weight()), TypeError, "x must be a torch.Tensor"),
    "x half": (
        lambda: native.gemm(torch.randn(2, 128).half(), weight()),
        TypeError,
        "x must be torch.float32 or",
    ),
    "x width": (
        lambda: native.gemm(torch.randn(2, 64), weight()),
        ValueError,
        r"x must have shape \[\*, 128\]",
    ),
    "x one dimension": (
        lambda: native.gemm(torch.randn(128), weight()),
        ValueError,
        "x must have shape",
    ),
    "x transposed": (
        lambda: native.gemm(torch.randn(128, 2).T, weight()),
        ValueError,
        "x must be contiguous",
    ),
    "x on meta": (
        lambda: native.gemm(torch.empty(2, 128, device="meta"), weight()),
        ValueError,
        "x must be a dense CPU",
    ),
    "x expanded rows": (
        lambda: native.gemm(torch.randn(1, 128).expand(3, 128), weight()),
        ValueError,
        "x must not overlap",
    ),
    "out shape": (
        lambda: native.gemm(torch.randn(2, 128), weight(), out=torch.zeros(2, 63)),
        ValueError,
        "out must have",
    ),
    "out dtype": (
        lambda: native.gemm(torch.randn(2, 128), weight(), out=torch.zeros(2, 64).int()),
        TypeError,
        "out must be",
    ),
    "out overlapping": (
        lambda: native.gemm(torch.randn(2, 128), weight(), out=torch.zeros(1, 64).expand(2, 64)),
        ValueError,
        "out must not overlap",
    ),
    "bias length": (
        lambda: native.gemm(torch.randn(2, 128), weight(), bias=torch.zeros(63)),
        ValueError,
        "bias must have",
    ),
    "k of 96": (
        lambda: native.Nf4Panels.from_bnb(torch.zeros(1, dtype=torch.uint8), torch.zeros(1), 1, 96),
        ValueError,
        "k must",
    ),
    "n of 0": (
        lambda: native.Nf4Panels.from_bnb(torch.zeros(1, dtype=torch.uint8), torch.zeros(1), 0, 64),
        ValueError,
        "n must",
    ),
    "packed short": (
        lambda: native.Nf4Panels.from_bnb(
            torch.zeros(31, dtype=torch.uint8), torch.zeros(1), 1, 64
        ),
        ValueError,
        "packed must hold 32",
    ),
    "packed dtype": (
        lambda: native.Nf4Panels.from_bnb(torch.zeros(32), torch.zeros(1), 1, 64),
        TypeError,
        "packed must be",
    ),
    "absmax long": (
        lambda: native.Nf4Panels.from_bnb(
            torch.zeros(32, dtype=torch.uint8), torch.zeros(2), 1, 64
        ),
        ValueError,
        "absmax must hold 1",
    ),
    "parts empty": (lambda: native.Nf4Panels.stack([], 64), ValueError, "parts must not be empty"),
    "weight int": (lambda: native.quantise_nf4(torch.zeros(64).int()), TypeError, "weight must be"),
    "weight empty": (
        lambda: native.quantise_nf4(torch.zeros(0, 64)),
        ValueError,
        "weight must not be empty",
    ),
    "weight strided": (
        lambda: native.quantise_nf4(torch.zeros(64, 64).T[:, :3]),
        ValueError,
        "weight must be contiguous",
    ),
    "plain dtypes": (
        lambda: native.gemm(torch.zeros(1, 64), plain(torch.bfloat16)),
        TypeError,
        "x must be torch.bfloat16",
    ),
    "plain width": (
        lambda: native.gemm(torch.zeros(1, 65), plain()),
        ValueError,
        "x must have shape",
    ),
    "plain bias": (
        lambda: native.gemm(torch.zeros(1, 64), plain(), bias=torch.zeros(5)),
        ValueError,
        "bias must",
    ),
    "plain k": (
        lambda: native.PlainPanels.pack(torch.zeros(4, 96)),
        ValueError,
        "k a multiple of 64",
    ),
    "plain row": (lambda: plain().take(torch.tensor([0, 4])), ValueError, "lies outside"),
    "plain index": (lambda: plain().take(torch.zeros(1)), TypeError, "index must be torch.int64"),
    "level": (lambda: native.set_isa("sse9"), ValueError, "level must be one of"),
    "slot range": (lambda: plan_of([[(8, 1.0)]], [1], 8), ValueError, "StepPlan: a slot"),
    "row range": (
        lambda: native.StepPlan.of([[]], [0, 1], slots=8),
        ValueError,
        "StepPlan: a slot, row",
    ),
    "gamma": (lambda: plan_of([[(1, torch.inf)]], [1], 8), ValueError, "term_gamma must be finite"),
    "term_ptr end": (
        lambda: native.StepPlan(i32(0, 3), i32(1), torch.ones(1), i32(0), slots=8),
        ValueError,
        "term_ptr must hold",
    ),
    "term_ptr falling": (
        lambda: native.StepPlan(i32(0, 2, 1), i32(1), torch.ones(1), i32(0), slots=8),
        ValueError,
        "StepPlan",
    ),
    "heads": (lambda: attention(q=torch.randn(2, 3, 32)), ValueError, "heads must be a multiple"),
    "tokens of the values": (
        lambda: attention(v_cache=torch.zeros(3, 5, 2, 32)),
        ValueError,
        "v_cache must have shape",
    ),
    "value head size 24": (
        lambda: attention(v_cache=torch.zeros(3, 4, 2, 24)),
        ValueError,
        "v_cache must have a head size",
    ),
    "head size 528": (
        lambda: attention(k_cache=torch.zeros(3, 4, 2, 528), q=torch.randn(2, 4, 528)),
        ValueError,
        "k_cache must have a head size",
    ),
    "head size 24": (
        lambda: attention(k_cache=torch.zeros(3, 4, 2, 24), v_cache=torch.zeros(3, 4, 2, 24)),
        ValueError,
        "k_cache must have a head size",
    ),
    "q dtype": (
        lambda: attention(q=torch.randn(2, 4, 32).bfloat16()),
        TypeError,
        "q must be torch.float32",
    ),
    "q_start end": (lambda: attention(q_start=i32(0, 1, 3)), ValueError, "paged_attention"),
    "q_start falling": (lambda: attention(q_start=i32(0, 3, 2)), ValueError, "paged_attention"),
    "context short": (lambda: attention(context=i32(0, 4)), ValueError, "paged_attention"),
    "context past the table": (lambda: attention(context=i32(3, 5)), ValueError, "paged_attention"),
    "context dtype": (
        lambda: attention(context=torch.tensor([3, 4])),
        TypeError,
        "context must be torch.int32",
    ),
    "block number": (
        lambda: attention(block_tables=i32(0, 3).reshape(2, 1)),
        ValueError,
        "paged_attention",
    ),
    "block negative": (
        lambda: attention(block_tables=i32(0, -1).reshape(2, 1)),
        ValueError,
        "paged_attention",
    ),
    "window": (lambda: attention(window=-1), ValueError, "window and softcap"),
    "sinks": (lambda: attention(sinks=torch.zeros(2)), ValueError, "sinks must have shape"),
    "sinks dtype": (lambda: attention(sinks=i32(0, 0, 0, 0)), TypeError, "sinks must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_raise_and_name_the_argument(built: None, name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_the_same_calls_with_good_arguments_pass(built: None) -> None:
    assert attention().shape == (2, 4, 32)
    assert native.gemm(torch.randn(2, 128), weight()).shape == (2, 64)
    assert native.gemm(torch.randn(0, 128), weight()).shape == (0, 64)


def test_offsets_outside_the_arena_are_refused_before_anything_is_read(built: None) -> None:
    case = make([4, 4], [64], 128, F32)
    x, plan = torch.randn(2, 128), plan_of([[(1, 1.0)]], [2], 2)
    native.delta(torch.zeros(2, 64), x, case.tables, plan)
    for table in (case.tables.a_off, case.tables.b_off):
        before = int(table[1, 0])
        for wrong in (case.tables.arena.numel() - 3, (1 << 63) - 1):
            table[1, 0] = wrong
            with pytest.raises(ValueError, match="arena offset"):
                native.delta(torch.zeros(2, 64), x, case.tables, plan)
        table[1, 0] = before
    case.tables.rank[1, 0] = -4
    with pytest.raises(ValueError, match="site"):
        native.delta(torch.zeros(2, 64), x, case.tables, plan)


def test_a_plan_of_another_step_or_site_is_refused(built: None) -> None:
    case = make([4, 4], [64], 128, F32)
    y, x = torch.zeros(2, 64), torch.randn(2, 128)
    with pytest.raises(ValueError, match="plan must be for the 2 rows"):
        native.delta(y, x, case.tables, plan_of([[(1, 1.0)]], [3], 2))
    with pytest.raises(ValueError, match="site"):
        native.delta(y, x, case.tables, plan_of([[(1, 1.0)]], [2], 3))
    with pytest.raises(ValueError, match="no tables"):
        native.Site(weight())(x, plan_of([[(1, 1.0)]], [2], 2))
    with pytest.raises(TypeError, match=r"out must be a torch\.float32"):
        native.Site(None, case.tables, shape=(64, 128))(x, plan_of([[]], [2], 2))


@pytest.mark.parametrize(
    "change", [{"rank": torch.zeros(2, 1)}, {"cols": [(0, 0)]}, {"arena": torch.zeros(4).half()}]
)
def test_malformed_tables_are_refused(built: None, change: dict[str, Any]) -> None:
    t = make([4, 4], [64], 128, F32).tables
    good = {name: getattr(t, name) for name in ("arena", "a_off", "b_off", "rank", "scale", "cols")}
    native.SiteTables(**good)
    with pytest.raises((TypeError, ValueError), match=next(iter(change))):
        native.SiteTables(**{**good, **change})


def test_write_refuses_slots_and_shapes_out_of_range(built: None) -> None:
    k = torch.zeros(2, 4, 2, 16)
    layer, new = native.PagedAttention(k, k.clone(), heads=2, scale=1.0), torch.randn(1, 2, 16)
    layer.write(new, new, torch.tensor([7]))
    for slot in (8, -2):
        with pytest.raises(ValueError, match="write"):
            layer.write(new, new, torch.tensor([slot]))
    with pytest.raises(TypeError, match=r"slots must be torch\.int64"):
        layer.write(new, new, i32(1))
    with pytest.raises(ValueError, match="k must have shape"):
        layer.write(new[:, :1], new, torch.tensor([1]))


def test_a_dtype_of_no_kind_is_refused_by_the_library_itself(built: None) -> None:
    """No wrapper lets one through."""
    panels = native.Nf4Panels.blank(32, 64)
    out = torch.zeros(32, 64)
    for dtype in (-1, 2):
        code = library().fader_panels_dense(
            32, 64, panels.panels.data_ptr(), panels.scales.data_ptr(), out.data_ptr(), dtype, 1
        )
        assert code == -1
    assert not out.any()
