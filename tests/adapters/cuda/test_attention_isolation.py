"""A row's bits depend on the row alone: not on company, capacities, chunks or foreign memory."""

import itertools

import pytest
import torch
from torch import Tensor

from fader_adapters.kernels.cuda import attention_configs as configs
from tests.adapters.cuda.attention_runs import attend
from tests.adapters.cuda.attention_world import FOREIGN, Row, Shape, World, make_row

SHAPE = Shape(heads=4, kv_heads=2, dim=128)
WINDOWED = Shape(heads=4, kv_heads=1, dim=32, window=30)
SINKS = Shape(heads=4, kv_heads=1, dim=128, window=30, sinks=True)


def alone(shape: Shape, row: Row, **capacity: int) -> Tensor:
    return attend(World(shape, [row]), **capacity)[0]


def company(shape: Shape) -> list[Row]:
    sizes = [(1, 7), (20, 33), (1, 300), (2, 2)]
    return [make_row(shape, *size, seed=50 + i) for i, size in enumerate(sizes)]


ROWS = [(1, 20), (1, 270), (9, 40), (50, 50)]
QUICK_ROWS = {
    *((SHAPE, (1, 270)), (SHAPE, (9, 40))),
    *((WINDOWED, (1, 20)), (WINDOWED, (50, 50))),
    *((SINKS, (1, 270)), (SINKS, (50, 50))),
}
"""Each shape, and each number of tokens and of keys."""


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        pytest.param(*pair, marks=[] if pair in QUICK_ROWS else pytest.mark.slow)
        for pair in itertools.product((SHAPE, WINDOWED, SINKS), ROWS)
    ],
    ids=str,
)
def test_a_row_has_the_same_bits_alone_and_in_company(shape: Shape, row: tuple[int, int]) -> None:
    own = make_row(shape, *row, seed=1)
    others = company(shape)
    mixed = attend(World(shape, [*others[:2], own, *others[2:]]))[2]
    assert torch.equal(mixed, alone(shape, own))
    assert not torch.equal(mixed, alone(shape, make_row(shape, *row, seed=2)))


@pytest.mark.parametrize("context", [5, 140, 300])
def test_capacities_of_the_step_do_not_show_in_the_bits(context: int) -> None:
    row = make_row(SHAPE, 1, context, seed=1)
    assert torch.equal(alone(SHAPE, row), alone(SHAPE, row, context=4096, tokens=512))


def test_programs_that_take_several_splits_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = make_row(SHAPE, 1, 500, seed=1)
    wide = alone(SHAPE, row)
    monkeypatch.setattr(configs, "DECODE_PROGRAMS", 1)
    assert torch.equal(alone(SHAPE, row), wide)


CUTS = [3, 16, 37, 64, 77]
QUICK_CUTS = {(SHAPE, 16), (SHAPE, 37), (WINDOWED, 3), (WINDOWED, 64), (SINKS, 77)}
"""Each shape and each cut."""


@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        pytest.param(*pair, marks=[] if pair in QUICK_CUTS else pytest.mark.slow)
        for pair in itertools.product((SHAPE, WINDOWED, SINKS), CUTS)
    ],
    ids=str,
)
def test_a_prompt_has_the_same_bits_in_one_chunk_and_in_two(shape: Shape, cut: int) -> None:
    whole = make_row(shape, 80, 80, seed=3)
    head = Row(whole.q[:cut], whole.k[:cut], whole.v[:cut])
    tail = Row(whole.q[cut:], whole.k, whole.v)
    assert torch.equal(torch.cat(attend(World(shape, [head, tail]))), alone(shape, whole))


def test_a_row_whose_values_are_not_finite_stays_among_itself() -> None:
    bad = make_row(SHAPE, 1, 40, seed=4)
    bad.v[:] = torch.inf
    good = make_row(SHAPE, 6, 40, seed=5)
    mixed = attend(World(SHAPE, [bad, good, bad]))
    assert not mixed[0].isfinite().any()
    assert torch.equal(mixed[1], alone(SHAPE, good))


@pytest.mark.parametrize("count", [1, 10])
def test_memory_of_other_rows_is_never_read(count: int) -> None:
    world = World(SHAPE, [make_row(SHAPE, count, 35, seed=6)])
    used = sum(table.numel() for table in map(torch.tensor, world.tables)) * SHAPE.page
    assert int(world.k[..., 0, 0].isnan().sum()) == 2 * SHAPE.page + used - 35
    assert (world.table_tensor() == FOREIGN).any()
    assert attend(world)[0].isfinite().all()
    world.k.view(-1, 2, 128)[world.places(world.tables[0], 35)[20]] = torch.nan
    assert attend(world)[0].isnan().any(), "the poison must be able to show"


def test_keys_before_the_window_are_never_read_by_a_decode_row() -> None:
    world = World(WINDOWED, [make_row(WINDOWED, 1, 100, seed=7)])
    places = world.places(world.tables[0], 100)
    world.v.view(-1, 1, 32)[places[:70]] = torch.nan
    assert attend(world)[0].isfinite().all()
    world.v.view(-1, 1, 32)[places[70]] = torch.nan
    assert attend(world)[0].isnan().all()


def test_strided_queries_give_the_bits_of_adjacent_ones() -> None:
    world = World(SHAPE, company(SHAPE))
    wide = torch.full((*world.q.shape[:2], 160), torch.nan, device=world.q.device)
    wide[..., :128] = world.q
    for got, want in zip(attend(world, q=wide[..., :128]), attend(world), strict=True):
        assert torch.equal(got, want)
