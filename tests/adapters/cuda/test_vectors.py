"""Gains and biases of adapters through the CUDA backend, interpreted: fp64, company, capture."""

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_adapters.kernels.cuda import lora_calls
from fader_adapters.kernels.cuda.backend import CudaBackend
from fader_adapters.kernels.cuda.lora import LoraStep
from fader_adapters.kernels.nf4 import dense
from fader_adapters.spec import RowTerms, StepTerms
from tests.support.deltas import IN, OUTS, RANKS, World, make_world, steps

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on the CPU")
CPU = torch.device("cpu")
MIXES = {name: terms for name, terms in steps().items() if name != "base rows only"}
QUICK = {"one adapter, one row", "all distinct", "blends and prefill"}


class Run:
    """One site of the world over NF4, with or without a base's bias."""

    def __init__(self, world: World, *, bias: bool = True) -> None:
        random = torch.Generator().manual_seed(2)
        self.bias = torch.randn(sum(OUTS), generator=random) if bias else None
        self.backend = CudaBackend(CPU, torch.float32, entries=64)
        self.world = world
        self.site = self.backend.bind(world.site, self.backend.linear([world.weight], self.bias))

    def prepare(self, terms: StepTerms) -> LoraStep | None:
        step = self.backend.prepare(self.world.tables, terms)
        if step is not None:
            step.buffers.z.fill_(torch.nan)
        return step

    def __call__(self, x: torch.Tensor, terms: StepTerms) -> torch.Tensor:
        return self.site(x, self.prepare(terms))

    def expected(self, x: torch.Tensor, terms: StepTerms) -> torch.Tensor:
        shift = 0.0 if self.bias is None else self.bias.double()
        return self.world.expected(x, terms) + shift


def inputs(terms: StepTerms) -> torch.Tensor:
    tokens = sum(row.tokens for row in terms.rows)
    return torch.randn(tokens, IN, generator=torch.Generator().manual_seed(7))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in MIXES]
)
def test_every_mix_equals_fp64_and_the_base_bias_has_no_gain(name: str, bias: bool) -> None:
    run, terms = Run(make_world(RANKS, torch.float32, vectors=True), bias=bias), MIXES[name]
    x = inputs(terms)
    got, want = run(x, terms), run.expected(x, terms)
    close(got, want)
    plain = Run(make_world(RANKS, torch.float32), bias=bias)
    with pytest.raises(AssertionError):
        close(plain(x, terms), want)


def test_a_row_has_the_same_bits_alone_and_in_company() -> None:
    run, terms = Run(make_world(RANKS, torch.float32, vectors=True)), MIXES["all distinct"]
    x = inputs(terms)
    together = run(x, terms)
    for row, own in enumerate(terms.rows):
        alone = run(x[row : row + 1], StepTerms((own,)))
        assert torch.equal(alone[0], together[row])


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")
def test_an_infinite_gain_stays_with_its_row_and_a_zero_weight_selects() -> None:
    world = make_world(RANKS, torch.float32, vectors=True)
    at = int(world.tables.gain_offset[0, 0])
    world.tables.arena[at : at + OUTS[0]] = torch.inf
    run = Run(world)
    terms = StepTerms(
        (
            RowTerms(1, ((0, 1.0),)),
            RowTerms(1, ((1, 1.0),)),
            RowTerms(1, ((0, 0.0), (1, 1.0))),
            RowTerms(1),
        )
    )
    x = inputs(terms)
    got = run(x, terms)
    assert not got[0, : OUTS[0]].isfinite().any()
    assert got[1:].isfinite().all()
    close(got[1:], run.expected(x[1:], StepTerms((terms.rows[1], terms.rows[1], terms.rows[3]))))


def test_steps_without_vectors_launch_nothing_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(lora_calls, "vectors", refuse)
    run = Run(make_world(RANKS, torch.float32, vectors=True))
    neither = StepTerms((RowTerms(1, ((2, 1.0),)), RowTerms(1, ((4, 0.5),))))
    close(run(inputs(neither), neither), run.expected(inputs(neither), neither))
    with pytest.raises(AssertionError, match="launched"):
        run(inputs(neither), StepTerms((RowTerms(1, ((1, 1.0),)), RowTerms(1))))


@pytest.mark.parametrize("rows", [None, 4])
def test_a_blank_step_changes_nothing_and_real_ones_fill_its_buffers(rows: int | None) -> None:
    run = Run(make_world(RANKS, torch.float32, vectors=True))
    x = torch.randn(4, IN)
    blank = run.backend.blank(run.world.tables, rows, vectors=True)
    base = run.site(x, None)
    assert torch.equal(run.site(x, blank), base)
    terms = StepTerms((RowTerms(1, ((0, 0.5), (1, -1.0))), RowTerms(1), RowTerms(1, ((3, 1.0),))))
    step = run.prepare(terms)
    assert step is not None
    if rows is not None:
        got = run.site(x, blank)  # what a graph captured with the blank step does now
        close(got[:3], run.expected(x[:3], terms))
        assert torch.equal(got[3], base[3])


def test_rows_of_the_weight_are_those_of_the_dense_one() -> None:
    world = make_world(RANKS, torch.float32)
    linear = Run(world).site.base
    whole = dense(world.weight, torch.float32)
    for start, stop in ((0, 160), (5, 100), (130, 160)):
        assert torch.equal(linear.rows(start, stop), whole[start:stop])
