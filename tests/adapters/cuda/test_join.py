"""Decode rows whose base product and deltas end in one kernel, interpreted: fp64, bits, streams."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_adapters.kernels.cuda import lora_calls, nf4
from fader_adapters.kernels.cuda.backend import CudaBackend
from fader_adapters.kernels.cuda.beside import Beside
from fader_adapters.kernels.cuda.lora_launch import join, shrink
from fader_adapters.kernels.cuda.lora_tables import DECODE_TILE, PREFILL_TILE
from fader_adapters.kernels.cuda.sites import CudaSite
from fader_adapters.kernels.cuda.tiles import TileBuilder
from fader_adapters.spec import RowTerms, StepTerms
from tests.support.lora_world import DeltaWorld, make_delta_world
from tests.support.nf4_weights import random_weight, values

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on the CPU")
CPU = torch.device("cpu")
IN, OUTS = 1024, (96, 40, 72)
"""Wide enough that the product comes in planes; the last tile of columns is not full."""
RANKS = ((8,), (16,), (40, 0, 20), (1,), (5,))
TOLERANCE = 2e-5


class Run:
    """One site over NF4, with a bias or without."""

    def __init__(self, *, bias: bool = True, entries: int = 64) -> None:
        torch.manual_seed(0)
        self.world: DeltaWorld = make_delta_world([(IN, OUTS)], RANKS, torch.float32)
        self.weight = random_weight(sum(OUTS), IN)
        self.bias = torch.randn(sum(OUTS)) if bias else None
        self.backend = CudaBackend(CPU, torch.float32, entries=entries)
        base = self.backend.linear([self.weight], self.bias)
        self.site: CudaSite = self.backend.bind(self.world.sites[0], base)

    def __call__(self, x: torch.Tensor, terms: StepTerms) -> torch.Tensor:
        step = self.backend.prepare(self.world.tables, terms)
        if step is not None:
            step.buffers.z.fill_(torch.nan)
        return self.site(x, step)

    def expected(self, x: torch.Tensor, terms: StepTerms) -> torch.Tensor:
        y = x.double() @ values(self.weight).T
        if self.bias is not None:
            y += self.bias.double()
        return self.world.expected(y, x, self.world.sites[0], terms)


def singles(*blends: tuple[tuple[int, float], ...]) -> StepTerms:
    return StepTerms(tuple(RowTerms(1, blend) for blend in blends))


MIXES = {
    "one row": singles(((0, 1.0),)),
    "one adapter": singles(*[((1, 1.0),)] * 7),
    "distinct and the base": singles(*[((i, 1.0),) if i < 5 else () for i in range(7)]),
    "blends": singles(*[((i % 5, 0.5), ((i + 1) % 5, -0.7)) if i % 3 else () for i in range(24)]),
    "skewed": singles(((2, 1.0),), *[((3, 1.0),)] * 18),
}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are launched."""
    launched: list[str] = []
    for name in ("shrink", "expand", "join", "vectors"):
        call = getattr(lora_calls, name)

        def noted(*given: object, name: str = name, call=call) -> None:
            launched.append(name)
            call(*given)

        monkeypatch.setattr(lora_calls, name, noted)

    add: Callable[..., None] = nf4.add_planes

    def summed(*given: object) -> None:
        launched.append("sum")
        add(*given)

    monkeypatch.setattr(nf4, "add_planes", summed)
    return launched


QUICK = {"one row", "distinct and the base", "blends"}


@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in MIXES]
)
def test_every_mix_equals_fp64_by_two_kernels_behind_the_product(
    name: str, bias: bool, kernels: list[str]
) -> None:
    run, terms = Run(bias=bias), MIXES[name]
    x = torch.randn(len(terms.rows), IN)
    got, want = run(x, terms), run.expected(x, terms)
    assert kernels == ["shrink", "join"]
    torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE)
    wrong = singles(((0, 0.99),), *(row.terms for row in terms.rows[1:]))
    assert (got.double() - run.expected(x, wrong))[0].abs().max() > 10 * TOLERANCE


def test_rows_without_terms_have_the_bits_of_the_base() -> None:
    run, terms = Run(), MIXES["blends"]
    x = torch.randn(24, IN)
    x[0] = 0.0  # sums of −0.0 and 0.0 show what a mere addition of nothing would change
    got = run(x, terms)
    base = run(x, singles(*[()] * 24))
    free = [i for i, row in enumerate(terms.rows) if not row.terms]
    assert len(free) == 8
    assert torch.equal(got[free].view(torch.int32), base[free].view(torch.int32))
    assert not torch.equal(got[1], base[1])


def test_a_row_has_the_same_bits_alone_in_company_and_beyond_the_fixed_room() -> None:
    run, small = Run(), Run(entries=2)
    small.backend.prepare(small.world.tables, MIXES["one row"])
    terms = MIXES["blends"]
    x = torch.randn(24, IN)
    together = run(x, terms)
    step = small.backend.prepare(small.world.tables, terms)
    assert step is not None
    assert step.bucket is None
    assert torch.equal(small(x, terms), together)
    for row in (0, 2):
        alone = run(x[row : row + 1], StepTerms(terms.rows[row : row + 1]))
        assert torch.equal(alone[0], together[row])


@pytest.mark.slow
def test_padding_of_a_bucket_is_the_bases_and_none_is_written_past_the_rows_there_are() -> None:
    run, terms = Run(), MIXES["distinct and the base"]
    step = run.backend.prepare(run.world.tables, terms)
    assert step is not None
    assert (step.tokens, step.bucket) == (7, 8)
    x, out = torch.randn(8, IN), torch.full((9, sum(OUTS)), 7.0)
    assert isinstance(run.site.base, nf4.Nf4Linear)
    planes = run.site.base.planes(x)
    assert planes is not None
    shrink(x, run.site._bound, step)
    join(planes, out[:8], run.site._bound, step, run.bias)
    assert torch.equal(out[:8], run(x, terms))
    assert torch.equal(out[7], run(x, singles(*[()] * 8))[7])
    assert (out[8] == 7.0).all()
    out.fill_(7.0)
    planes = run.site.base.planes(x[:7])
    assert planes is not None
    shrink(x[:7], run.site._bound, step)
    join(planes, out[:7], run.site._bound, step, run.bias)
    assert torch.equal(out[:7], run(x[:7], terms))
    assert (out[7:] == 7.0).all()


def test_longer_rows_and_weights_in_one_part_end_the_other_way(kernels: list[str]) -> None:
    run = Run()
    run(torch.randn(4, IN), StepTerms((RowTerms(3, ((0, 1.0),)), RowTerms(1, ((1, 1.0),)))))
    assert kernels == ["shrink", "expand"] * 2
    kernels.clear()
    base = run.backend.linear([random_weight(160, 128)], None)
    narrow = make_delta_world([(128, (96, 64))], [(8,)], torch.float32)
    backend = CudaBackend(CPU, torch.float32, entries=8)
    site = backend.bind(narrow.sites[0], base)
    site(torch.randn(1, 128), backend.prepare(narrow.tables, MIXES["one row"]))
    assert kernels == ["shrink", "expand"]


class Noted(Beside):
    """Tells when the other stream is entered and waited for."""

    def __init__(self, order: list[str]) -> None:
        super().__init__(CPU)
        self.order = order

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.order.append("fork")
        yield
        self.order.append("back")

    def join(self) -> None:
        self.order.append("wait")


@pytest.mark.parametrize(("tokens", "last"), [(1, "join"), (5, "expand")])
def test_what_reads_the_other_streams_work_comes_after_the_wait(
    kernels: list[str], tokens: int, last: str
) -> None:
    run = Run()
    run.site._beside = Noted(kernels)
    product: Callable[..., None] = nf4.Nf4Linear._gemm

    def gemm(*given: object) -> None:
        kernels.append("product")
        product(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4.Nf4Linear, "_gemm", gemm)
        run(torch.randn(tokens, IN), StepTerms((RowTerms(tokens, ((0, 1.0),)),)))
    products = ["product"] if tokens == 1 else []
    assert kernels == ["fork", "shrink", "back", *products, "wait", last]


def test_a_step_in_pieces_is_joined_with_the_bits_it_has_at_once(kernels: list[str]) -> None:
    whole, pieces = Run(), Run(entries=4)
    shapes = (replace(DECODE_TILE, most=4), PREFILL_TILE)
    pieces.backend._deltas._builder = TileBuilder(*shapes)
    terms = MIXES["blends"]
    x = torch.randn(len(terms.rows), IN)
    want = whole(x, terms)
    kernels.clear()
    assert torch.equal(pieces(x, terms), want)
    assert kernels == ["shrink", "join"] * (len(kernels) // 2)
    assert len(kernels) >= 6
