"""The reference attention: nothing of the null block reaches a row, whatever is in it."""

import math
from types import SimpleNamespace

import pytest
import torch

from fader_server.model.attention import AttentionParams
from fader_server.model.kv_cache import LayerCache
from fader_server.model.torch_attention import TorchAttention

BLOCK = 4
HEADS, WIDTH = 2, 8


def batch(contexts: list[int]) -> SimpleNamespace:
    """Rows of one query each, whose blocks follow one another from block 1 on."""
    most = max(contexts) // BLOCK + 1
    tables = torch.zeros(len(contexts), most, dtype=torch.int32)
    free = 1
    for row, context in enumerate(contexts):
        count = -(-context // BLOCK)
        tables[row, :count] = torch.arange(free, free + count)
        free += count
    return SimpleNamespace(
        rows=[SimpleNamespace(count=1, context=c, begin=i) for i, c in enumerate(contexts)],
        slots=torch.zeros(len(contexts), dtype=torch.long),
        contexts=torch.tensor(contexts),
        block_tables=tables,
    )


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("sinks", [False, True])
def test_what_the_null_block_holds_reaches_no_row(poison, sinks):
    made = torch.Generator().manual_seed(0)
    rows = batch([1, 5, 70])
    cache = LayerCache(*(torch.randn(30, BLOCK, HEADS, WIDTH, generator=made) for _ in "kv"))
    q = torch.randn(3, 2 * HEADS, WIDTH, generator=made)
    params = AttentionParams(1.0, None, None, sinks=torch.zeros(2 * HEADS) if sinks else None)
    attention = TorchAttention(BLOCK)
    groups = attention.prepare(rows)
    cache.k[0], cache.v[0] = 0.0, 0.0
    clean = attention.attend(q, cache, params, groups)
    cache.k[0], cache.v[0] = poison, poison
    assert torch.equal(attention.attend(q, cache, params, groups), clean)
    assert clean.isfinite().all()
    cache.v[1] = poison  # or nothing is tested
    assert not torch.equal(attention.attend(q, cache, params, groups), clean)
