"""The deltas of stacks of experts in Triton's interpreter against fp64, pair by pair, and a row's
bits in any company."""

from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")
if torch.cuda.is_available():
    pytest.skip("with a GPU tests/gpu checks these kernels", allow_module_level=True)

from fader_adapters.kernels.cuda import expert_calls, expert_configs, lora
from fader_adapters.kernels.cuda.backend import CudaBackend
from fader_adapters.kernels.cuda.expert_configs import (
    pairs_of_program,
    parts_of_list,
    shipped,
)
from fader_adapters.kernels.cuda.lora_step import LoraStep
from fader_adapters.kernels.cuda.lora_tables import DECODE_TILE, PREFILL_TILE
from fader_adapters.kernels.cuda.sites import CudaStack
from fader_adapters.kernels.cuda.tiles import TileBuilder
from fader_adapters.kernels.routing import Routing
from fader_adapters.spec import RowTerms, SiteSpec, StepTerms
from tests.support.deltas import steps
from tests.support.stacks import IN, OUT, RANKS, SITE, World, chosen, routed

CPU = torch.device("cpu")
TOLERANCE = 1e-5
empty = torch.empty


@dataclass
class Rig:
    """A stack with adapters, and its kernels."""

    world: World
    backend: CudaBackend
    stack: CudaStack

    def run(
        self, terms: StepTerms, routing: Routing, x: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        """y with the deltas added, in a copy."""
        step = self.backend.prepare(self.world.tables, terms)
        return self.stack(y.clone(), x, routing, step)


def rig(experts: int = 5, *, first: int = 0, **options) -> Rig:
    world = World(torch.float32, experts=experts, slots=range(first, first + 6))
    backend = CudaBackend(CPU, torch.float32, arch=90, **options)
    return Rig(world, backend, backend.bind_stack(SITE, experts))


@pytest.fixture(scope="module")
def shared() -> Rig:
    return rig()


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """All columns and entries at once, for the interpreter's sake."""
    monkeypatch.setattr(expert_configs, "EXACT_BLOCK", 128)
    monkeypatch.setattr(expert_configs, "MOST_PARTS", 1)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch that was not written shows."""

    def spoiled(*given, **named) -> torch.Tensor:
        made = empty(*given, **named)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", spoiled)


def operands(routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of a routing's pairs, in rows of a wider tensor."""
    g = torch.Generator().manual_seed(3)
    pairs = len(routing.token)
    x = torch.randn(pairs, IN + 16, generator=g)[:, :IN]
    return x, torch.randn(pairs, OUT + 16, generator=g)[:, 8:-8]


def total(terms: StepTerms) -> int:
    return sum(row.tokens for row in terms.rows)


def error(made: Rig, terms: StepTerms, routing: Routing, wrong: StepTerms | None = None) -> float:
    x, y = operands(routing)
    got = made.run(wrong or terms, routing, x, y)
    want = made.world.expected(y, x, routing, terms)
    return float((got.double() - want).abs().max())


COMPANY = (
    ((0, 0.5), (1, -0.7)),
    ((1, 1.0), (2, 2.0), (4, 0.1)),
    (),
    ((0, 1.0), (3, 0.3), (4, 1.1), (5, -0.2)),
    ((3, 1.0),),
)

MIXED = StepTerms(
    (
        RowTerms(1, ((0, 0.5), (1, -0.7))),
        RowTerms(1, ((1, -0.7), (2, 2.0), (4, 0.1))),
        RowTerms(1),
        RowTerms(5, ((2, 1.0), (5, -1.5))),
        RowTerms(2),
        RowTerms(2, ((4, 0.3),)),
    )
)
LONG = {"skewed", "blends and prefill"}
"""They take the interpreter their time."""
MIXES = {**steps(), "few of every kind": MIXED}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in MIXES]
)
def test_every_mix_equals_fp64(shared: Rig, name: str) -> None:
    terms = MIXES[name]
    assert error(shared, terms, Routing.of(chosen(total(terms)), 5)) < TOLERANCE


@pytest.mark.parametrize(("experts", "count"), [(1, 1), pytest.param(8, 3, marks=pytest.mark.slow)])
def test_any_number_of_experts_equals_fp64(experts: int, count: int) -> None:
    """One expert is a router."""
    routing = Routing.of(chosen(total(MIXED), experts=experts, count=count), experts)
    assert error(rig(experts), MIXED, routing) < TOLERANCE


def test_the_comparison_notices_a_wrong_weight_and_another_expert(shared: Rig) -> None:
    terms = StepTerms((RowTerms(1, ((0, 0.5), (1, -0.7))),))
    routing = Routing.of(chosen(1), 5)
    wrong = StepTerms((RowTerms(1, ((0, 0.5), (1, -0.69))),))
    assert error(shared, terms, routing, wrong) > 10 * TOLERANCE
    x, y = operands(routing)
    got = shared.run(terms, replace(routing, expert=4 - routing.expert), x, y)
    want = shared.world.expected(y, x, routing, terms)
    assert float((got.double() - want).abs().max()) > 0.1


@pytest.mark.parametrize("block", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_columns_in_several_blocks_equal_fp64(
    shared: Rig, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_configs, "EXACT_BLOCK", block)
    terms = StepTerms((RowTerms(2, COMPANY[0]),))
    assert error(shared, terms, Routing.of(chosen(2), 5)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 7, 63, 133])
@pytest.mark.parametrize("mix", ["one", "distinct", "skewed", "blends"])
def test_every_row_count_and_mix(shared: Rig, tokens: int, mix: str) -> None:
    blends = {
        "one": [((0, 1.0),)] * tokens,
        "distinct": [((i % 6, 0.5 + i / tokens),) for i in range(tokens)],
        "skewed": [((0 if i else 1, 1.0),) for i in range(tokens)],
        "blends": [tuple((s, 0.5 - s) for s in range(6) if i >> s & 1) for i in range(tokens)],
    }[mix]
    routing = Routing.of(chosen(tokens), 5)
    rows = StepTerms(tuple(RowTerms(1, blend) for blend in blends))
    assert error(shared, rows, routing) < 3 * TOLERANCE
    whole = StepTerms((RowTerms(tokens, blends[-1]),))
    assert error(shared, whole, routing) < 3 * TOLERANCE


@pytest.mark.parametrize(
    ("mine", "tokens"),
    [
        pytest.param(b, n, marks=[] if (b, n) == (COMPANY[1], 2) else pytest.mark.slow)
        for b in COMPANY
        for n in (1, 2, 37)
    ],
)
def test_a_row_has_the_same_bits_alone_and_in_any_company(shared: Rig, mine, tokens: int) -> None:
    """At other places of tiles and programs, in other slots, beside any number of pairs."""
    row, moved = RowTerms(tokens, mine), rig(first=7)
    others = [RowTerms(tokens // 5 + 1, blend) for blend in COMPANY if blend != mine]
    choice = chosen(tokens + 5)[5:]
    x, y = operands(Routing.of(choice, 5))
    bits = []
    for made, company in (
        (moved, [row]),
        (shared, [row]),
        (shared, [*others, row]),
        (shared, [*others[:2], row, *others[1:] * 2]),
    ):
        before = sum(r.tokens for r in company[: company.index(row)])
        terms = StepTerms(tuple(company))
        every = chosen(total(terms))
        every[before : before + tokens] = choice
        routing = Routing.of(every, 5)
        xs, ys = operands(routing)
        own = (routing.token >= before) & (routing.token < before + tokens)
        xs[own], ys[own] = x, y
        if made is moved:
            shifted = tuple((slot + 7, gamma) for slot, gamma in mine)
            terms = StepTerms((RowTerms(tokens, shifted),))
        bits.append(made.run(terms, routing, xs, ys)[own])
    assert all(torch.equal(found, bits[0]) for found in bits)
    touched = any(slot != 3 for slot, _ in mine)
    assert torch.equal(bits[0], y) != touched


def test_summing_the_same_terms_in_another_order_gives_other_bits(shared: Rig) -> None:
    """What the test above could not notice if the sums were exact."""
    routing = Routing.of(chosen(1), 5)
    x, y = operands(routing)
    blend = ((0, 0.5), (1, -0.7), (2, 1.3))
    there, back = (StepTerms((RowTerms(1, b),)) for b in (blend, blend[::-1]))
    assert not torch.equal(shared.run(there, routing, x, y), shared.run(back, routing, x, y))


@pytest.mark.parametrize(
    ("factor", "tokens"),
    [
        pytest.param(factor, n, marks=[] if (factor, n) == ("b", 2) else pytest.mark.slow)
        for factor in "abx"
        for n in (1, 2)
    ],
)
def test_one_adapters_nan_stays_with_its_rows(factor: str, tokens: int) -> None:
    made = rig()
    terms = StepTerms(
        tuple(RowTerms(tokens, blend) for blend in (((0, 1.0),), ((1, 1.0),), (), ((2, 1.0),)))
    )
    routing = Routing.of(chosen(4 * tokens), 5)
    x, y = operands(routing)
    clean = made.run(terms, routing, x, y)
    bad = (routing.token >= tokens) & (routing.token < 2 * tokens)
    if factor == "x":
        x[bad] = torch.nan
    else:
        tables = made.world.tables
        offset, width = {"a": (tables.a_offset, IN), "b": (tables.b_offset, OUT)}[factor]
        at = int(offset[1, 1])
        tables.arena[at : at + RANKS[1] * width * 5] = torch.nan
    got = made.run(terms, routing, x, y)
    assert torch.equal(got[~bad], clean[~bad])
    assert got[bad].isnan().all()


def test_rows_without_terms_keep_every_bit(shared: Rig) -> None:
    rows = (RowTerms(1), RowTerms(2), RowTerms(2, COMPANY[0]), RowTerms(1, COMPANY[1]))
    routing = Routing.of(chosen(6), 5)
    x, y = operands(routing)
    y[:, 0] = -0.0
    got = shared.run(StepTerms(rows), routing, x, y)
    free = routing.token < 3
    assert torch.equal(got[free].view(torch.int32), y[free].contiguous().view(torch.int32))
    assert not torch.equal(got[~free], y[~free])


def test_padding_of_a_bucket_is_neither_read_nor_written(shared: Rig) -> None:
    terms = StepTerms(tuple(RowTerms(1, ((i % 6, 1.0),)) for i in range(5)))
    routing = Routing.of(chosen(8), 5)
    x, y = operands(routing)
    rest = routing.token >= 5
    x[rest] = y[rest] = torch.nan
    got = shared.run(terms, routing, x, y)
    own = replace(routing, token=routing.token[~rest], expert=routing.expert[~rest])
    want = shared.world.expected(y[~rest], x[~rest], own, terms)
    torch.testing.assert_close(got[~rest].double(), want, rtol=0, atol=TOLERANCE)
    assert got[rest].isnan().all()


def test_a_step_whose_adapters_leave_all_stacks_alone_launches_nothing(
    shared: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, mine = (StepTerms((RowTerms(1, ((slot, 1.0),)),)) for slot in (3, 0))
    for terms, touches in ((other, False), (mine, True)):
        step = shared.backend.prepare(shared.world.tables, terms)
        assert isinstance(step, LoraStep)
        assert step.stacks is touches
    monkeypatch.delattr(expert_calls, "_shrink_kernel")
    routing = Routing.of(chosen(1), 5)
    x, y = operands(routing)
    assert torch.equal(shared.run(other, routing, x, y), y)
    with pytest.raises(NameError):
        shared.run(mine, routing, x, y)


@pytest.mark.slow
def test_prompts_in_fixed_buffers_have_the_bits_of_others() -> None:
    made = rig()
    terms = StepTerms((RowTerms(5, COMPANY[1]), RowTerms(3), RowTerms(2, COMPANY[0])))
    routing = Routing.of(chosen(total(terms)), 5)
    x, y = operands(routing)
    before = made.run(terms, routing, x, y)
    made.backend.reserve_prompts(made.world.tables, (64, 128))
    made.world.tables.generation += 1
    step = made.backend.prepare(made.world.tables, terms)
    assert isinstance(step, LoraStep)
    assert step.prompt == 64
    assert torch.equal(made.run(terms, routing, x, y), before)
    blank = made.backend.blank_prompt(made.world.tables, 64, stacks=True)
    assert torch.equal(made.stack(y.clone(), x, routing, blank), y), "a blank step adds nothing"


def test_more_tokens_than_before_find_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first list of a step begins where those of tokens without one would."""
    monkeypatch.setattr(lora, "LEAST", replace(lora.LEAST, tokens=4))
    made = rig(entries=6)
    for rows, others in ((1, 0), (2, 2), (2, 7)):
        terms = StepTerms((RowTerms(others), RowTerms(rows, ((1, 1.0),))))
        assert error(made, terms, Routing.of(chosen(rows + others), 5)) < TOLERANCE


@pytest.mark.slow
def test_how_pairs_are_shared_out_changes_no_bit(
    shared: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = StepTerms((RowTerms(2, COMPANY[3]), RowTerms(1, COMPANY[0])))
    routing = Routing.of(chosen(total(terms)), 5)
    x, y = operands(routing)
    want = shared.run(terms, routing, x, y)
    for block, parts in ((1, 4), (16, 2)):
        monkeypatch.setattr(expert_calls, "pairs_of_program", lambda *_, block=block: block)
        monkeypatch.setattr(expert_calls, "parts_of_list", lambda *_, parts=parts: parts)
        assert torch.equal(shared.run(terms, routing, x, y), want)


def test_programs_take_what_meets_in_an_expert_and_share_out_lists_of_few(monkeypatch) -> None:
    monkeypatch.undo()
    assert [pairs_of_program("prefill", n, 8) for n in (1, 8, 16, 31, 64, 1 << 20)] == [
        *(1, 1, 2, 2, 8, 16)
    ]
    assert pairs_of_program("decode", 1 << 20, 8) == 1
    assert [parts_of_list(n) for n in (1, 16, 17, 32, 64, 1000)] == [4, 4, 2, 2, 1, 1]


def test_float32_rows_over_another_dtype_are_launched_as_such(monkeypatch) -> None:
    launched: list[tuple[str, dict]] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((self._name, options))

    monkeypatch.undo()
    for name in ("shrink", "expand"):
        monkeypatch.setattr(expert_calls, f"_{name}_kernel", Recorder(f"expert_{name}"))
    for arch in (80, 90):
        launched.clear()
        for width in (64, 14336):
            world = World(torch.bfloat16)
            backend = CudaBackend(CPU, torch.bfloat16, arch=arch)
            stack = backend.bind_stack(SiteSpec((1,), width, (OUT,)), 5)
            for rows in (1, 70):
                terms = StepTerms((RowTerms(rows, ((0, 1.0),)),))
                routing = Routing.of(chosen(rows), 5)
                step = backend.prepare(world.tables, terms)
                for dtype in (torch.bfloat16, torch.float32):
                    x = empty(2 * rows, width, dtype=dtype)
                    stack(x.new_empty(2 * rows, OUT), x, routing, step)
        listed = [
            (
                s.kernel.__name__,
                s.constexprs | {"num_warps": s.num_warps, "num_stages": s.num_stages},
            )
            for s in shipped()
            if arch in s.archs
        ]
        assert {options["F32"] for _, options in launched} == {False, True}
        assert all(entry in listed for entry in launched)
        name, options = launched[-1]
        assert (name, options | {"num_warps": 16}) not in listed


def test_pairs_of_a_step_in_pieces_have_the_bits_they_have_at_once(shared: Rig) -> None:
    made = rig(entries=4)
    shapes = (replace(DECODE_TILE, most=4), replace(PREFILL_TILE, most=8))
    made.backend._deltas._builder = TileBuilder(*shapes)
    routing = routed(total(MIXED))
    x, y = operands(routing)
    step = made.backend.prepare(made.world.tables, MIXED)
    assert step is not None
    assert len(step.launches) > 3
    assert torch.equal(made.run(MIXED, routing, x, y), shared.run(MIXED, routing, x, y))
