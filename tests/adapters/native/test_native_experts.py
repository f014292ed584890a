"""A stack of experts in one call: against float64, and a row's bits its own in any company."""

import pytest
import torch

from fader_adapters.kernels import native
from fader_adapters.kernels.native import ExpertPanels, Nf4Panels, PlainPanels, Workspace

pytestmark = pytest.mark.usefixtures("built")

EXPERTS, N, K = 5, 96, 192
DTYPES = [torch.float32, torch.bfloat16]
FORMS = ["plain", "nf4"]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
COUNTS = {
    "one row": (0, 0, 1, 0, 0),
    "few rows": (1, 0, 3, 2, 1),
    "all at one": (0, 0, 0, 0, 63),
    "skewed": (1, 300, 0, 5, 17),
    "even": (30, 31, 29, 27, 16),
}


@pytest.fixture(autouse=True)
def own_threads():
    yield
    native.set_threads(None)


def made(
    dtype: torch.dtype,
    form: str = "plain",
    *,
    bias: bool = False,
    workspace: Workspace | None = None,
):
    """The weights as they are held, in float64, the biases and the stack."""
    g = torch.Generator().manual_seed(4)
    weight = (torch.randn(EXPERTS, N, K, generator=g) * 0.1).to(dtype)
    offset = torch.randn(EXPERTS, N, generator=g).to(dtype) if bias else None
    if form == "plain":
        panels = PlainPanels.pack(weight.view(-1, K))
    else:
        packed = native.quantise_nf4(weight)
        panels = Nf4Panels.from_bnb(packed.packed, packed.absmax, EXPERTS * N, K)
        weight = panels.dense(torch.float32).view_as(weight)
    experts = ExpertPanels(panels, EXPERTS, bias=offset, workspace=workspace)
    return weight.double(), offset, experts


def ends_of(counts) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mix", sorted(COUNTS))
@pytest.mark.parametrize(("form", "bias"), [("plain", False), ("plain", True), ("nf4", True)])
def test_each_row_meets_its_own_expert(
    level: str, mix: str, form: str, bias: bool, dtype: torch.dtype
):
    workspace = Workspace(1 << 16)
    workspace.poison()
    weight, offset, panels = made(dtype, form, bias=bias, workspace=workspace)
    counts = COUNTS[mix]
    x = torch.randn(sum(counts), K).to(dtype)
    got = panels(x, ends_of(counts)).double()
    expert = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(counts))
    wanted = torch.einsum("pk,pnk->pn", x.double(), weight[expert])
    if offset is not None:
        wanted += offset.double()[expert]
    scale = wanted.abs().max()
    assert (got - wanted).abs().max() <= BOUND[dtype] * scale
    other = torch.einsum("pk,pnk->pn", x.double(), weight[(expert + 1) % EXPERTS])
    assert (got - other).abs().max() > 0.1 * scale, "experts are told apart"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_rows_bits_are_its_own(level: str, threads: int, form: str, dtype: torch.dtype):
    native.set_threads(threads)
    _, _, panels = made(dtype, form)
    counts = COUNTS["skewed"]
    x = torch.randn(sum(counts), K).to(dtype)
    together = panels(x, ends_of(counts))
    expert = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(counts))
    for row in (0, 1, 150, 300, 301, 306, 322):
        alone = [int(e == expert[row]) for e in range(EXPERTS)]
        assert torch.equal(panels(x[row : row + 1], ends_of(alone))[0], together[row])
    wide = torch.full((len(x), 2 * K), float("nan"), dtype=dtype)
    wide[:, :K] = x
    assert torch.equal(panels(wide[:, :K], ends_of(counts)), together), "rows may be strided"
    odd = torch.empty(len(x) * K + 1, dtype=dtype)[1:].view(len(x), K).copy_(x)
    assert torch.equal(panels(odd, ends_of(counts)), together), "rows may lie anywhere"


def test_nan_of_a_row_stays_there(level: str):
    _, _, panels = made(torch.bfloat16)
    x = torch.randn(8, K, dtype=torch.bfloat16)
    clean = panels(x, ends_of((2, 2, 2, 1, 1)))
    x[3] = float("nan")
    got = panels(x, ends_of((2, 2, 2, 1, 1)))
    assert got[3].isnan().all()
    kept = torch.arange(8) != 3
    assert torch.equal(got[kept], clean[kept])


def test_nothing_is_computed_of_nothing():
    _, _, panels = made(torch.float32)
    assert panels(torch.empty(0, K), torch.zeros(EXPERTS, dtype=torch.int32)).shape == (0, N)


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        ((1, 1, 3, 2, 4), "outside its table"),
        ((0, 1, 2, 3, 3), "outside its table"),
        ((0, 1, 2, 3, 5), "outside its table"),
        ((-1, 1, 2, 3, 4), "outside its table"),
        ((1, 2, 3, 4), "shape"),
    ],
)
def test_ends_that_are_none_are_refused(ends, told: str):
    _, _, panels = made(torch.float32)
    with pytest.raises(ValueError, match=told):
        panels(torch.randn(4, K), torch.tensor(ends, dtype=torch.int32))


@pytest.mark.parametrize(("rows", "experts"), [(66, 2), (64, 3), (64, 0)])
def test_shapes_that_panels_do_not_hold_are_refused(rows: int, experts: int):
    panels = PlainPanels.pack(torch.randn(rows, 64))
    with pytest.raises(ValueError, match=r"multiple of 32|positive"):
        ExpertPanels(panels, experts)
    assert ExpertPanels.fits(32, 64)
    assert not ExpertPanels.fits(33, 64)
    assert not ExpertPanels.fits(32, 63)


def test_nf4_experts_are_products_of_their_own_matrices():
    """The same bits as one linear of one expert has."""
    _, _, panels = made(torch.bfloat16, "nf4")
    assert isinstance(panels.panels, Nf4Panels)
    x = torch.randn(7, K, dtype=torch.bfloat16)
    for expert in range(EXPERTS):
        own = panels.panels.rows(expert * N, (expert + 1) * N)
        alone = native.gemm(x, own, out=torch.empty(7, N, dtype=torch.bfloat16))
        counts = [7 * (e == expert) for e in range(EXPERTS)]
        assert torch.equal(panels(x, ends_of(counts)), alone)


def test_rows_of_another_type_or_width_are_refused():
    _, _, panels = made(torch.bfloat16)
    ends = ends_of((4, 0, 0, 0, 0))
    with pytest.raises(TypeError, match="bfloat16"):
        panels(torch.randn(4, K), ends)
    with pytest.raises(ValueError, match="shape"):
        panels(torch.randn(4, K + 64, dtype=torch.bfloat16), ends)
    with pytest.raises(TypeError, match="int32"):
        panels(torch.randn(4, K, dtype=torch.bfloat16), ends.long())
