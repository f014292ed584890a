"""Deltas of stacks of experts: every backend against fp64, pair by pair, and a row's own bits."""

from dataclasses import replace

import pytest
import torch

from fader_adapters.kernels import native
from fader_adapters.kernels.backend import StackBackend, choose
from fader_adapters.kernels.routing import Routing
from fader_adapters.spec import RowTerms, StepTerms
from tests.support.deltas import steps
from tests.support.stacks import EXPERTS, IN, OUT, RANKS, SITE, World, chosen, routed

STEPS = steps()
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
BACKENDS = [
    pytest.param(
        "native", marks=pytest.mark.skipif(not native.available(), reason="no native library")
    ),
    "reference",
]


def computed(
    backend: str, world: World, terms: StepTerms, routing: Routing, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    kernels = choose(torch.device("cpu"), x.dtype, backend)  # type: ignore[arg-type]
    assert isinstance(kernels, StackBackend)
    stack = kernels.bind_stack(SITE, EXPERTS)
    return stack(y.clone(), x, routing, kernels.prepare(world.tables, terms))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mix", sorted(STEPS))
def test_every_pair_gets_its_own_blend_at_its_own_expert(backend, mix, dtype):
    world, terms = World(dtype), STEPS[mix]
    routing = routed(sum(row.tokens for row in terms.rows))
    x = torch.randn(len(routing.token), IN).to(dtype)
    y = torch.randn(len(routing.token), OUT).to(dtype)
    got = computed(backend, world, terms, routing, x, y)
    expected = world.expected(y, x, routing, terms)
    assert float((got.double() - expected).abs().max()) < BOUND[dtype] * 4
    rows = [row.terms for row in terms.rows for _ in range(row.tokens)]
    changed = torch.tensor([any(s in world.factors for s, _ in rows[t]) for t in routing.token])
    assert torch.equal(got[~changed], y[~changed]), "a pair without terms keeps its bits"
    if changed.any():
        assert float((y.double() - expected).abs().max()) > 0.1, "the check could not fail"
        other = replace(routing, expert=EXPERTS - 1 - routing.expert)
        wrong = computed("reference", world, terms, other, x, y)
        assert float((wrong.double() - expected).abs().max()) > 0.1, "experts are told apart"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rows_bits_are_its_own_whatever_slots_and_company(backend):
    world, moved = World(torch.bfloat16), World(torch.bfloat16, slots=range(7, 13))
    terms = STEPS["blends and prefill"]
    tokens = [row.tokens for row in terms.rows]
    choice = chosen(sum(tokens))
    routing = Routing.of(choice, EXPERTS)
    x = torch.randn(len(routing.token), IN, dtype=torch.bfloat16)
    y = torch.randn(len(routing.token), OUT, dtype=torch.bfloat16)
    together = computed(backend, world, terms, routing, x, y)
    begin = 0
    for row in terms.rows:
        own = (routing.token >= begin) & (routing.token < begin + row.tokens)
        alone = Routing.of(choice[begin : begin + row.tokens], EXPERTS)
        shifted = RowTerms(row.tokens, tuple((slot + 7, gamma) for slot, gamma in row.terms))
        got = computed(backend, moved, StepTerms((shifted,)), alone, x[own], y[own])
        assert torch.equal(got, together[own])
        begin += row.tokens
    halved = StepTerms((RowTerms(1, ((0, 0.5), (1, -0.6))), *terms.rows[1:]))
    assert not torch.equal(computed(backend, world, halved, routing, x, y), together)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pairs_terms_are_summed_in_its_rows_order_in_whatever_slots_they_are(backend):
    slots = [4, 2, 5, 1, 3, 0]
    world, moved = World(torch.float32), World(torch.float32, slots=slots)
    given = ((0, 0.5), (1, -0.7), (2, 1.1), (4, 0.3))
    routing = routed(3)
    x, y = torch.randn(6, IN), torch.randn(6, OUT)

    def run(world: World, terms: tuple[tuple[int, float], ...]) -> torch.Tensor:
        return computed(backend, world, StepTerms((RowTerms(3, terms),)), routing, x, y)

    expected = run(world, given)
    assert torch.equal(run(moved, tuple((slots[slot], gamma) for slot, gamma in given)), expected)
    assert not torch.equal(run(world, given[::-1]), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_adapters_nan_stays_with_its_rows(backend):
    world = World(torch.float32)
    terms = StepTerms((RowTerms(3, ((0, 1.0),)), RowTerms(3, ((1, 1.0),)), RowTerms(3)))
    routing = routed(9)
    x, y = torch.randn(18, IN), torch.randn(18, OUT)
    clean = computed(backend, world, terms, routing, x, y)
    at = int(world.tables.a_offset[1, 1])
    world.tables.arena[at : at + RANKS[1] * IN * EXPERTS] = float("nan")
    got = computed(backend, world, terms, routing, x, y)
    bad = (routing.token >= 3) & (routing.token < 6)
    assert torch.equal(got[~bad], clean[~bad])
    assert got[bad].isnan().all()


def test_a_step_follows_tables_that_change():
    world = World(torch.float32)
    kernels = choose(torch.device("cpu"), torch.float32)
    assert isinstance(kernels, StackBackend)
    stack = kernels.bind_stack(SITE, EXPERTS)
    terms = StepTerms((RowTerms(7, ((0, 1.0),)),))
    routing = routed(7)
    x, y = torch.randn(14, IN), torch.randn(14, OUT)

    def now() -> torch.Tensor:
        return stack(y.clone(), x, routing, kernels.prepare(world.tables, terms))

    before = now()
    world.tables.scale[0, 1] *= 2
    world.tables.generation += 1
    assert torch.allclose(now() - y, 2 * (before - y), atol=1e-5)
    world.tables.retract(0)
    assert torch.equal(now(), y)
