"""The reference kernel against fp64, term by term."""

import pytest
import torch

from fader_adapters.kernels.nf4 import dense
from fader_adapters.kernels.reference import DecodedLinear, ReferenceBackend
from fader_adapters.spec import RowTerms, StepTerms
from tests.support.deltas import IN, OUTS, RANKS, World, make_world, steps

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}


def _run(world: World, x: torch.Tensor, terms: StepTerms) -> torch.Tensor:
    backend = ReferenceBackend()
    site = backend.bind(world.site, backend.linear([world.weight], None))
    return site(x, backend.prepare(world.tables, terms))


def _input(terms: StepTerms, dtype: torch.dtype, padding: int = 0) -> torch.Tensor:
    tokens = sum(row.tokens for row in terms.rows) + padding
    return torch.randn(tokens, IN, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", steps())
def test_every_mix_equals_fp64(name, dtype):
    world, terms = make_world(RANKS, dtype), steps()[name]
    x = _input(terms, dtype)
    torch.testing.assert_close(
        _run(world, x, terms).double(), world.expected(x, terms), rtol=0, atol=TOLERANCE[dtype]
    )


def test_the_comparison_notices_one_wrong_weight():
    world, terms = make_world(RANKS, torch.float32), steps()["blends and prefill"]
    x = _input(terms, torch.float32)
    wrong = StepTerms((RowTerms(1, ((0, 0.5), (1, -0.69))), *terms.rows[1:]))
    error = (_run(world, x, wrong).double() - world.expected(x, terms)).abs().max()
    assert error > 10 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_terms_and_padding_equal_the_base_bit_for_bit(dtype):
    world, terms = make_world(RANKS, dtype), steps()["blends and prefill"]
    x = _input(terms, dtype, padding=3)
    backend = ReferenceBackend()
    base = backend.linear([world.weight], None)(x)
    y = _run(world, x, terms)
    free = [2, *range(103, 126), *range(133, 136)]
    assert torch.equal(y[free], base[free])
    assert not torch.equal(y[0], base[0])


def test_an_idle_step_has_no_delta_work_at_all():
    world = make_world(RANKS, torch.float32)
    assert ReferenceBackend().prepare(world.tables, steps()["base rows only"]) is None


def test_infinity_in_the_product_of_another_adapter_stays_with_its_own_row():
    world = make_world(RANKS, torch.float32)
    a = int(world.tables.a_offset[1, 0])
    world.tables.arena[a : a + 16 * IN] = 3e38
    terms = StepTerms((RowTerms(1, ((0, 1.0),)), RowTerms(1, ((1, 1.0),)), RowTerms(1)))
    x = _input(terms, torch.float32).abs() + 1
    y = _run(world, x, terms)
    assert y[[0, 2]].isfinite().all()
    assert not y[1].isfinite().all()


def test_a_republished_slot_is_read_anew():
    world, terms = make_world(RANKS, torch.float32), steps()["one adapter, every row"]
    x = _input(terms, torch.float32)
    backend = ReferenceBackend()
    site = backend.bind(world.site, backend.linear([world.weight], None))
    before = site(x, backend.prepare(world.tables, terms))
    world.tables.scale[0] *= 2
    assert torch.equal(site(x, backend.prepare(world.tables, terms)), before)
    world.tables.generation += 1
    assert not torch.equal(site(x, backend.prepare(world.tables, terms)), before)


@pytest.mark.parametrize("rows", [7, 32, 160, 1000])
def test_a_weight_decoded_in_chunks_equals_the_whole(rows):
    world = make_world(RANKS, torch.float32)
    x, bias = torch.randn(5, IN), torch.randn(sum(OUTS))
    whole = x @ dense(world.weight, torch.float32).T + bias
    torch.testing.assert_close(DecodedLinear(world.weight, bias, chunk=rows * IN)(x), whole)


def test_a_rows_terms_are_summed_in_its_own_order_in_whatever_slots_they_are():
    world, slots = make_world(RANKS, torch.float32, vectors=True), [4, 2, 5, 1, 3, 0]
    moved = make_world(RANKS, torch.float32, vectors=True)
    t = moved.tables
    for table in (t.a_offset, t.b_offset, t.gain_offset, t.bias_offset, t.rank, t.scale):
        table[slots] = table[: len(slots)].clone()

    def renamed(row: RowTerms) -> RowTerms:
        return RowTerms(row.tokens, tuple((slots[slot], gamma) for slot, gamma in row.terms))

    rows = (RowTerms(3, ((0, 0.5), (1, -0.7), (3, 1.1), (4, 0.3))), RowTerms(2, ((4, 0.3),)))
    x = _input(StepTerms(rows), torch.float32)
    expected = _run(world, x, StepTerms(rows))
    assert torch.equal(_run(moved, x, StepTerms(tuple(map(renamed, rows)))), expected)
    backwards = RowTerms(3, rows[0].terms[::-1])
    assert not torch.equal(_run(world, x, StepTerms((backwards, rows[1]))), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", steps())
def test_a_row_alone_has_the_bits_it_has_in_company(name, dtype):
    world, terms = make_world(RANKS, dtype), steps()[name]
    x = _input(terms, dtype)
    together = _run(world, x, terms)
    start = 0
    for row in terms.rows:
        rows = slice(start, start := start + row.tokens)
        assert torch.equal(_run(world, x[rows], StepTerms((row,))), together[rows])
