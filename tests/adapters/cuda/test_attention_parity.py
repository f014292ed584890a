"""The Triton kernels against dense float64 attention; places of no row hold NaN."""

import itertools
from typing import Any

import pytest
import torch

from tests.adapters.cuda.attention_runs import attend
from tests.adapters.cuda.attention_world import Shape, World, dense, error, make_row

TOLERANCE = 2e-5

SHAPES = [
    Shape(heads=2, kv_heads=2, dim=32),
    Shape(heads=4, kv_heads=1, dim=64, softcap=20.0),
    Shape(heads=8, kv_heads=1, dim=80, window=20),
    Shape(heads=4, kv_heads=1, dim=96, page=5),
    Shape(heads=16, kv_heads=2, dim=128, window=37, softcap=30.0),
    Shape(heads=1, kv_heads=1, dim=256, page=32, window=1),
    Shape(heads=7, kv_heads=1, dim=48, page=8),
    Shape(heads=3, kv_heads=1, dim=16, window=64),
    Shape(heads=8, kv_heads=2, dim=64, sinks=True),
    Shape(heads=6, kv_heads=1, dim=48, window=20, softcap=30.0, sinks=True),
]


def worst(shape: Shape, rows: list[tuple[int, int]], **changes: Any) -> float:
    world = World(shape, [make_row(shape, *row, seed) for seed, row in enumerate(rows)])
    results = zip(world.rows, attend(world, **changes), strict=True)
    errors = [error(got, dense(shape, row)) for row, got in results]
    return max(errors, key=lambda e: (e != e, e))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_and_prefill_rows_match_float64(shape: Shape) -> None:
    page = shape.page
    rows = [(1, 1), (1, page), (1, page + 1), (5, 5), (2, page), (page + 2, 3 * page), (3, 70)]
    assert worst(shape, rows) < TOLERANCE


@pytest.mark.parametrize(
    ("dim", "context"), [(128, 128), (128, 129), (256, 300), (32, 257), (64, 512)]
)
def test_rows_of_several_splits_match_float64(dim: int, context: int) -> None:
    shape = Shape(heads=2, kv_heads=1, dim=dim)
    assert worst(shape, [(1, context), (1, 3)]) < TOLERANCE


def test_rows_of_several_splits_with_sinks_match_float64() -> None:
    shape = Shape(heads=3, kv_heads=1, dim=128, sinks=True)
    assert worst(shape, [(1, 300), (1, 129), (1, 128)]) < TOLERANCE


@pytest.mark.parametrize("sinks", [False, True])
def test_a_window_that_begins_inside_a_split_matches_float64(sinks: bool) -> None:
    shape = Shape(heads=2, kv_heads=1, dim=128, window=150, sinks=sinks)
    assert worst(shape, [(1, 333), (40, 333), (1, 150), (1, 151), (2, 151)]) < TOLERANCE


def test_prompts_of_several_tiles_match_float64() -> None:
    shape = Shape(heads=4, kv_heads=1, dim=32)
    assert worst(shape, [(150, 150), (1, 9), (33, 100), (2, 2)]) < TOLERANCE


@pytest.mark.slow
def test_more_rows_than_one_look_at_the_row_list_takes() -> None:
    shape = Shape(heads=1, kv_heads=1, dim=16)
    rows = [(1, 1 + seed % 3) for seed in range(130)] + [(3, 4), (2, 20)]
    assert worst(shape, rows) < TOLERANCE


def test_a_row_with_more_keys_than_the_most_splits_hold_lengthens_them() -> None:
    shape = Shape(heads=1, kv_heads=32, dim=128)
    # 32 splits of 128 keys, and one key more
    shape = Shape(heads=32, kv_heads=32, dim=128) if torch.cuda.is_available() else shape
    with pytest.MonkeyPatch.context() as patch:
        from fader_adapters.kernels.cuda import attention_configs

        patch.setattr(attention_configs, "max_splits", lambda _: 2)
        small = Shape(heads=2, kv_heads=1, dim=128)
        assert attention_configs.split_keys(600, dim=128, kv_heads=1) == (384, 2)
        assert worst(small, [(1, 600), (1, 256), (1, 257)]) < TOLERANCE


@pytest.mark.parametrize(
    "changes", [{"scale": 0.1}, {"window": 19}, {"window": 21}, {"softcap": 9.0}]
)
@pytest.mark.parametrize("count", [1, 6])
def test_other_mathematics_are_noticed(changes: dict[str, float], count: int) -> None:
    shape = Shape(heads=2, kv_heads=1, dim=32, window=20)
    assert worst(shape, [(count, 50)], **changes) > 100 * TOLERANCE


@pytest.mark.parametrize("size", [(1, 50), (1, 300), (6, 50)])
def test_sinks_of_other_heads_and_none_are_noticed(size: tuple[int, int]) -> None:
    shape = Shape(heads=2, kv_heads=1, dim=128, sinks=True)
    assert shape.sink_scores is not None
    for sinks in (None, shape.sink_scores.flip(0)):
        assert worst(shape, [size], sinks=sinks) > 100 * TOLERANCE


@pytest.mark.parametrize("sizes", [[(1, 7), (1, 300)], [(6, 40), (1, 50)]])
def test_sinks_that_weigh_nothing_give_the_bits_of_none(sizes: list[tuple[int, int]]) -> None:
    shape = Shape(heads=2, kv_heads=1, dim=128)
    world = World(shape, [make_row(shape, *size, seed) for seed, size in enumerate(sizes)])
    nothing = torch.full((2,), -torch.inf, device=shape.device)
    for got, want in zip(attend(world, sinks=nothing), attend(world), strict=True):
        assert torch.equal(got, want)


GRID = itertools.product((1, 4, 8), (0, 16, 33), (0.0, 25.0), (32, 64, 80, 96, 128, 256))


@pytest.mark.slow
@pytest.mark.parametrize(("group", "window", "softcap", "dim"), list(GRID))
def test_every_combination_matches_float64(
    group: int, window: int, softcap: float, dim: int
) -> None:
    shape = Shape(heads=2 * group, kv_heads=2, dim=dim, window=window, softcap=softcap)
    edges = [15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 256, 257]
    assert worst(shape, [(1, 1)] + [(1, n) for n in edges]) < TOLERANCE
    assert worst(shape, [(min(n, 3 + i), n) for i, n in enumerate(edges)]) < TOLERANCE
