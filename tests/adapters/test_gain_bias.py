"""Gains of the base and biases of B on every backend here: fp64, company, bad numbers."""

from collections.abc import Callable

import pytest
import torch

from fader_adapters.kernels import native
from fader_adapters.kernels.backend import Backend, BaseLinear
from fader_adapters.kernels.cpu import NativeBackend
from fader_adapters.kernels.dense import DenseLinear
from fader_adapters.kernels.nf4 import dense
from fader_adapters.kernels.reference import ReferenceBackend
from fader_adapters.spec import RowTerms, StepTerms
from tests.support.deltas import IN, OUTS, RANKS, World, make_world, steps

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}
BACKENDS: dict[str, Callable[[], Backend]] = {"reference": ReferenceBackend}
if native.available():
    BACKENDS["native"] = NativeBackend
DTYPES = [torch.float32, torch.bfloat16]


class Run:
    """One site of the world on one backend, over NF4 or a dense copy of it, with a bias."""

    def __init__(self, backend: Backend, world: World, *, over: str = "nf4") -> None:
        random = torch.Generator().manual_seed(2)
        self.bias = torch.randn(sum(OUTS), generator=random).to(world.tables.arena.dtype)
        base: BaseLinear = backend.linear([world.weight], self.bias)
        if over == "dense":
            base = DenseLinear(dense(world.weight, torch.float32), self.bias)
        self.backend, self.world = backend, world
        self.site = backend.bind(world.site, base)

    def __call__(self, x: torch.Tensor, terms: StepTerms) -> torch.Tensor:
        return self.site(x, self.backend.prepare(self.world.tables, terms))


def inputs(terms: StepTerms, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tokens = sum(row.tokens for row in terms.rows)
    return torch.randn(tokens, IN, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", steps())
def test_every_mix_equals_fp64_and_the_base_bias_has_no_gain(backend, name, dtype):
    world, terms = make_world(RANKS, dtype, vectors=True), steps()[name]
    run, x = Run(backend, world), inputs(terms, dtype)
    want = world.expected(x, terms) + run.bias
    torch.testing.assert_close(run(x, terms).double(), want, rtol=0, atol=TOLERANCE[dtype])


def test_a_dense_base_gives_the_same(backend):
    world, terms = make_world(RANKS, torch.float32, vectors=True), steps()["blends and prefill"]
    run, x = Run(backend, world, over="dense"), inputs(terms)
    want = world.expected(x, terms) + run.bias
    torch.testing.assert_close(run(x, terms).double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("table", ["gain_offset", "bias_offset"])
def test_the_comparison_notices_a_vector_that_is_left_out(backend, table):
    world, terms = make_world(RANKS, torch.float32, vectors=True), steps()["blends and prefill"]
    run, x = Run(backend, world), inputs(terms)
    want = world.expected(x, terms) + run.bias
    getattr(world.tables, table).fill_(-1)
    world.tables.generation += 1
    assert (run(x, terms).double() - want).abs().max() > 1e-2


@pytest.mark.skipif("native" not in BACKENDS, reason="the native library is not built")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_and_in_a_mixed_batch(dtype):
    world, terms = make_world(RANKS, dtype, vectors=True), steps()["blends and prefill"]
    run, x, at = Run(NativeBackend(), world), inputs(terms, dtype), 0
    together = run(x, terms)
    for row in terms.rows:
        alone = run(x[at : at + row.tokens], StepTerms((row,)))
        assert torch.equal(together[at : at + row.tokens], alone)
        at += row.tokens
    other = RowTerms(1, ((0, 0.5), (1, -0.6)))
    assert not torch.equal(run(x[:1], StepTerms((other,))), together[:1])


def test_bad_numbers_in_the_vectors_of_one_adapter_reach_no_other_row(backend):
    world = make_world(RANKS, torch.float32, vectors=True)
    terms = StepTerms(
        (
            RowTerms(1, ((0, 1.0),)),
            RowTerms(1, ((3, 1.0), (0, 0.5))),
            RowTerms(1),
            RowTerms(2, ((1, 0.3),)),
            RowTerms(1, ((3, 0.0), (0, 1.0))),
        )
    )
    run, x = Run(backend, world), inputs(terms)
    clean = run(x, terms)
    for table in (world.tables.gain_offset, world.tables.bias_offset):
        at = int(table[3, 0])
        world.tables.arena[at : at + OUTS[0]] = float("inf")
    world.tables.generation += 1
    dirty = run(x, terms)
    assert torch.equal(dirty[[0, 2, 3, 4, 5]], clean[[0, 2, 3, 4, 5]])
    assert not dirty[1].isfinite().all()


@pytest.mark.skipif("native" not in BACKENDS, reason="the native library is not built")
@pytest.mark.parametrize("table", ["gain_offset", "bias_offset"])
def test_native_refuses_a_vector_outside_the_arena(table):
    world, terms = make_world(RANKS, torch.float32, vectors=True), steps()["one adapter, one row"]
    run, x = Run(NativeBackend(), world), inputs(terms)
    run(x, terms)
    getattr(world.tables, table)[0] = world.tables.arena.numel() - 3
    with pytest.raises(ValueError, match="arena offset"):
        run(x, terms)
