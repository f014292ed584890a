"""A sequence's own cache: it grows as transformers' does, and is as it was when it is restored."""

from itertools import pairwise

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicLayer

from fader_server.model.states import (
    SPARE,
    GrowingLayer,
    StateShape,
    new_cache,
    restore,
    snapshot,
)
from tests.support.families import COMMON
from tests.support.solo_families import DELTA

PIECES = (1, 5, SPARE - 6, 1, 2, 2 * SPARE, 7)
"""To the end of the room, over it, and far over it."""


def keys(tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(1, 2, tokens, 4, generator=torch.Generator().manual_seed(seed))


def test_a_growing_layer_is_transformers_own_layer():
    ours, theirs = GrowingLayer(), DynamicLayer()
    for i, count in enumerate(PIECES):
        k, v = keys(count, i), keys(count, 100 + i)
        for given, expected in zip(ours.update(k, v), theirs.update(k, v), strict=True):
            assert torch.equal(given, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)


def test_a_token_copies_nothing_before_it():
    layer = GrowingLayer()
    places = [layer.update(keys(1, i), keys(1, i))[0].data_ptr() for i in range(3 * SPARE)]
    moves = sum(a != b for a, b in pairwise(places))
    assert moves == 2


def config() -> transformers.PretrainedConfig:
    return transformers.AutoConfig.for_model("qwen3_5_text", **COMMON, **DELTA)


def fill(cache: transformers.Cache, count: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    cache.update_conv_state(torch.randn(1, 8, count, generator=g), 0, conv_kernel_size=4)
    cache.update_recurrent_state(torch.randn(1, 2, 4, 4, generator=g), 0)
    cache.update(keys(count, seed), keys(count, seed + 1), 1)


def held(cache: transformers.Cache) -> list[torch.Tensor]:
    linear, attention = cache.layers
    parts = [linear.conv_states[0], linear.recurrent_states[0], attention.keys, attention.values]
    return [part.clone() for part in parts]


@pytest.mark.parametrize("count", [1, 3, 2 * SPARE])
def test_restored_it_is_as_it_was_any_number_of_times(count: int):
    cache = new_cache(config())
    fill(cache, 5, 1)
    before, kept = held(cache), snapshot(cache)
    after: list[list[torch.Tensor]] = []
    for _ in range(3):
        fill(cache, count, 7)
        after.append(held(cache))
        restore(cache, kept)
        assert all(map(torch.equal, held(cache), before))
    assert all(map(torch.equal, after[0], after[2]))
    assert not any(map(torch.equal, after[0], before))


def test_a_cache_that_was_empty_is_empty_again():
    cache = new_cache(config())
    kept = snapshot(cache)
    fill(cache, 5, 1)
    restore(cache, kept)
    fill(cache, 3, 2)
    fresh = new_cache(config())
    fill(fresh, 3, 2)
    assert all(map(torch.equal, held(cache), held(fresh)))


def test_the_shape_tells_what_grows_from_what_stays():
    caches = [new_cache(config()) for _ in range(2)]
    for cache, count in zip(caches, (8, 16), strict=True):
        fill(cache, count, 1)
    per_token = 2 * 2 * 4 * 4
    states = (8 * 4 + 2 * 4 * 4) * 4
    shape = StateShape.between(*caches, tokens=8)
    assert shape == StateShape(per_token, 2 * states + SPARE * per_token)
