"""Paged attention against float64 softmax; every token that must not be read is NaN."""

import pytest
import torch
from torch import Tensor

from fader_adapters.kernels import native

F32, BF16 = torch.float32, torch.bfloat16


def world(
    contexts: list[int],
    *,
    kv_heads: int,
    dim: int,
    block: int,
    dtype: torch.dtype,
    value_dim: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Caches whose free tokens are NaN, shuffled block tables, and each row's keys and values in
    order."""
    columns = max(-(-c // block) for c in contexts) + 1
    total = len(contexts) * columns
    k, v = (
        torch.full((total, block, kv_heads, size), torch.nan, dtype=dtype)
        for size in (dim, value_dim or dim)
    )
    tables = torch.randperm(total, dtype=torch.int32).reshape(len(contexts), columns)
    rows = []
    for r, context in enumerate(contexts):
        keys, values = (
            torch.randn(context, kv_heads, size).to(dtype) for size in (dim, value_dim or dim)
        )
        for p in range(context):
            b, o = int(tables[r, p // block]), p % block
            k[b, o], v[b, o] = keys[p], values[p]
        tables[r, -(-context // block) :] = 1 << 30  # entries past the context are never looked at
        rows.append((keys, values))
    return k, v, tables, rows


def expected(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    n, heads, _ = q.shape
    group = heads // keys.shape[1]
    k, v = (t.double().repeat_interleave(group, dim=1) for t in (keys, values))
    s = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    if cap:
        s = cap * torch.tanh(s / cap)
    pos = torch.arange(keys.shape[0] - n, keys.shape[0])[:, None]
    key = torch.arange(keys.shape[0])[None]
    hidden = (key > pos) | ((key <= pos - window) if window else torch.zeros_like(key > pos))
    s = s.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.double()[:, None, None].expand(heads, n, 1)], dim=-1)
    return torch.einsum("hqk,khd->qhd", s.softmax(-1)[..., : keys.shape[0]], v)


def sinks_of(heads: int, dtype: torch.dtype) -> Tensor:
    """From less than any key scores to more than most of them."""
    return torch.linspace(-2.0, 8.0, heads).to(dtype)


def starts(queries: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)


CASES = [  # heads, kv_heads, dim or (keys', values'), block, window, cap
    (8, 2, 64, 16, 0, 0.0),
    (4, 4, 32, 16, 0, 0.0),
    (6, 1, 80, 8, 0, 30.0),
    (4, 2, 128, 32, 24, 0.0),
    (2, 1, 256, 16, 70, 50.0),
    (3, 3, 48, 5, 33, 0.0),
    (4, 4, (192, 128), 16, 0, 0.0),
    (4, 1, (32, 80), 8, 24, 30.0),
    (2, 1, 512, 16, 0, 0.0),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_decode_and_prefill_match_float64(
    level: str, case: tuple, dtype: torch.dtype, with_sinks: bool
) -> None:
    heads, kv_heads, dim, block, window, cap = case
    sinks = sinks_of(heads, dtype) if with_sinks else None
    contexts, queries = [1, 33, 100, 64, 150], [1, 1, 40, 64, 7]
    dim, value_dim = dim if isinstance(dim, tuple) else (dim, dim)
    k, v, tables, rows = world(
        contexts, kv_heads=kv_heads, dim=dim, value_dim=value_dim, block=block, dtype=dtype
    )
    q, scale = torch.randn(sum(queries), heads, dim).to(dtype) * 2, dim**-0.5
    got = native.paged_attention(
        q,
        k,
        v,
        q_start=starts(queries),
        context=torch.tensor(contexts, dtype=torch.int32),
        block_tables=tables,
        scale=scale,
        window=window,
        softcap=cap,
        sinks=sinks,
    )
    at = 0
    for (keys, values), n in zip(rows, queries, strict=True):
        want = expected(q[at : at + n], keys, values, scale, window, cap, sinks)
        limit = 1e-5 if dtype == F32 else 2e-2
        assert (got[at : at + n].double() - want).abs().max() <= limit
        if n > 1:
            plain = expected(q[at : at + n], keys, values, scale * 2, window, cap, sinks)
            assert (plain - want).abs().max() > limit
        if sinks is not None:
            for others in (None, sinks.roll(1)):
                other = expected(q[at : at + n], keys, values, scale, window, cap, others)
                assert (other - want).abs().max() > limit
        at += n


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("value_dim", [64, 48])
def test_a_query_has_the_same_bits_in_any_batch_and_any_chunk(
    level: str, dtype: torch.dtype, window: int, with_sinks: bool, value_dim: int
) -> None:
    sinks = sinks_of(8, dtype) if with_sinks else None
    contexts = [90, 1, 77, 130]
    k, v, tables, _ = world(
        contexts, kv_heads=2, dim=64, value_dim=value_dim, block=16, dtype=dtype
    )
    layer = native.PagedAttention(k, v, heads=8, scale=0.125, window=window, sinks=sinks)
    q = torch.randn(90, 8, 64).to(dtype)
    whole = layer(
        q,
        q_start=starts([90]),
        context=torch.tensor([90], dtype=torch.int32),
        block_tables=tables[:1],
    )
    for cut in (1, 31, 64, 89):
        parts = [
            layer(
                part,
                q_start=starts([part.shape[0]]),
                context=torch.tensor([end], dtype=torch.int32),
                block_tables=tables[:1],
            )
            for part, end in ((q[:cut], cut), (q[cut:], 90))
        ]
        assert torch.equal(torch.cat(parts), whole), cut
    others = torch.randn(1 + 7 + 130, 8, 64).to(dtype)
    mixed = layer(
        torch.cat([others[:1], q[60:], others[1:]]),
        q_start=starts([1, 30, 7, 130]),
        context=torch.tensor([1, 90, 77, 130], dtype=torch.int32),
        block_tables=tables[[1, 0, 2, 3]],
    )
    assert torch.equal(mixed[1:31], whole[60:])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("sinks", [None, torch.tensor([1.0, 9.0])])
@pytest.mark.parametrize("value_dim", [32, 16, 80])
def test_long_context_is_the_same_for_any_number_of_threads(
    level: str, dtype: torch.dtype, sinks: Tensor | None, value_dim: int
) -> None:
    k, v, tables, rows = world(
        [2500], kv_heads=1, dim=32, value_dim=value_dim, block=16, dtype=dtype
    )
    layer = native.PagedAttention(k, v, heads=2, scale=0.2, sinks=sinks)
    q, before, got = torch.randn(1, 2, 32).to(dtype), torch.get_num_threads(), []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        got.append(
            layer(
                q,
                q_start=starts([1]),
                context=torch.tensor([2500], dtype=torch.int32),
                block_tables=tables,
            )
        )
    torch.set_num_threads(before)
    assert torch.equal(got[0], got[1])
    want = expected(q, *rows[0], 0.2, sinks=sinks)
    assert (got[0].double() - want).abs().max() <= (1e-5 if dtype == F32 else 5e-3)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_sinks_that_weigh_nothing_give_the_bits_of_none(level: str, dtype: torch.dtype) -> None:
    k, v, tables, _ = world([90], kv_heads=1, dim=32, block=16, dtype=dtype)
    q, given = torch.randn(7, 2, 32).to(dtype), []
    for sinks in (None, torch.full((2,), -torch.inf), torch.tensor([0.0, 90.0])):
        layer = native.PagedAttention(k, v, heads=2, scale=0.2, sinks=sinks)
        if sinks is not None:
            sinks.fill_(torch.nan)  # read once
        given.append(
            layer(
                q,
                q_start=starts([7]),
                context=torch.tensor([90], dtype=torch.int32),
                block_tables=tables,
            )
        )
    assert torch.equal(given[1], given[0])
    assert not torch.equal(given[2], given[0])
    assert given[2][:, 1].abs().max() < 1e-20, "a sink far above all keys takes everything"


def test_a_later_token_of_the_same_row_cannot_reach_back(level: str) -> None:
    k, v, tables, _ = world([40], kv_heads=1, dim=32, block=16, dtype=F32)
    layer, q = native.PagedAttention(k, v, heads=4, scale=0.2), torch.randn(40, 4, 32)
    args = {
        "q_start": starts([40]),
        "context": torch.tensor([40], dtype=torch.int32),
        "block_tables": tables,
    }
    clean = layer(q, **args)
    b, o = int(tables[0, 30 // 16]), 30 % 16
    k[b, o], v[b, o] = torch.nan, torch.inf
    dirty = layer(q, **args)
    assert torch.equal(dirty[:30], clean[:30])
    assert not bool(dirty[30:].isfinite().any())


@pytest.mark.parametrize("wide", [16, 48])
def test_write_puts_tokens_in_their_slots_and_skips_minus_one(level: str, wide: int) -> None:
    k, v = (torch.zeros(4, 4, 2, size, dtype=BF16) for size in (16, wide))
    layer = native.PagedAttention(k, v, heads=2, scale=1.0)
    qkv = torch.randn(3, 2 * (16 + 16 + wide)).bfloat16()
    new_k, new_v = qkv[:, 32:64].view(3, 2, 16), qkv[:, 64:].view(3, 2, wide)
    layer.write(new_k, new_v, torch.tensor([5, -1, 14]))
    assert torch.equal(k.view(16, 2, 16)[[5, 14]], new_k[[0, 2]])
    assert torch.equal(v.view(16, 2, wide)[[5, 14]], new_v[[0, 2]])
    assert int((k.view(16, -1) != 0).any(dim=1).sum()) == 2
