"""Fixed buffers of a step, the cache write, refusals and the tables of tile sizes."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fader_adapters.kernels.cuda import attention
from fader_adapters.kernels.cuda import attention_configs as configs
from fader_adapters.kernels.cuda.attention import PagedAttention, Scratch, write_cache
from fader_adapters.kernels.cuda.attention_step import StepBuffers
from tests.adapters.cuda.attention_runs import attend, kernel
from tests.adapters.cuda.attention_world import DEVICE, FOREIGN, Row, Shape, World, make_row

SHAPE = Shape(heads=4, kv_heads=2, dim=32)


def buffers(rows: int, tokens: int) -> StepBuffers:
    return StepBuffers(rows=rows, tokens=tokens, columns=8, block_size=SHAPE.page, device=DEVICE)


def fill(held: StepBuffers, world: World) -> None:
    held.step.block_tables.fill_(FOREIGN)
    slots = [
        int(place)
        for row, table in zip(world.rows, world.tables, strict=True)
        for place in world.places(table, row.context)[-row.q.shape[0] :]
    ]
    held.fill(world.starts, world.contexts, world.tables, slots)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    ("rows", "tokens", "sizes"),
    [
        (4, 4, [(1, 9), (1, 40)]),
        (4, 4, [(1, 9), (1, 40), (1, 1), (1, 17)]),
        (3, 40, [(1, 9), (20, 40)]),
        (2, 22, [(1, 9), (20, 40)]),
        (2, 21, [(1, 9), (20, 40)]),
    ],
)
def test_a_padded_step_gives_its_rows_the_same_bits_and_padding_zeros(
    rows: int, tokens: int, sizes: list[tuple[int, int]], sinks: bool
) -> None:
    shape = replace(SHAPE, sinks=sinks)
    world = World(shape, [make_row(shape, *size, seed) for seed, size in enumerate(sizes)])
    held = buffers(rows, tokens)
    before = held.step.block_tables.data_ptr(), held.slots.data_ptr()
    fill(held, World(SHAPE, [make_row(SHAPE, 1, 100, seed=9)] * rows))
    fill(held, world)
    assert before == (held.step.block_tables.data_ptr(), held.slots.data_ptr())
    used = world.starts[-1]
    q = torch.full((tokens, 4, 32), torch.nan, device=DEVICE)
    q[:used] = world.q
    out = kernel(world)(q, held.step, out=torch.full_like(q, torch.nan))
    assert torch.equal(out[:used], torch.cat(attend(world)))
    assert (out[used:] == 0).all()
    assert (held.slots[used:] == -1).all()
    assert (held.slots[:used] >= 0).all()


@pytest.mark.parametrize(
    ("starts", "contexts", "tables", "slots"),
    [
        ([0, 1, 2, 3], [1, 1, 1], [[0]] * 3, [0] * 3),  # a row too many
        ([0, 9], [9], [[0]], [0] * 9),  # tokens too many
        ([0, 1], [1], [list(range(9))], [0]),  # blocks too many
        ([0, 1], [1], [], [0]),
        ([0, 1], [1], [[0]], []),
    ],
)
def test_a_step_that_does_not_fit_is_refused_and_the_last_one_stays(
    starts: list[int], contexts: list[int], tables: list[list[int]], slots: list[int]
) -> None:
    held = buffers(2, 8)
    held.fill([0, 1], [1], [[3]], [48])
    with pytest.raises(ValueError, match="expected"):
        held.fill(starts, contexts, tables, slots)
    held.fill([0, 1], [1], [[3]], [48])
    assert held.slots[:2].tolist() == [48, -1]


def test_a_step_of_decode_rows_refuses_a_prompt() -> None:
    held = buffers(2, 2)
    with pytest.raises(ValueError, match="rows of one token"):
        held.fill([0, 2], [2], [[0]], [0, 1])
    with pytest.raises(ValueError, match="rows <= tokens"):
        buffers(3, 2)


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("kv_heads", "dim"), [(2, 32), (1, 80), (9, 128)])
def test_written_tokens_land_at_their_slots_and_padding_nowhere(
    kv_heads: int, dim: int, slot_dtype: torch.dtype
) -> None:
    cache = torch.full((2, 3, 4, kv_heads, dim), -7.0, device=DEVICE)
    wide = torch.randn(2, kv_heads, 5, dim + 16, device=DEVICE).transpose(1, 2)[..., :dim]
    slots = [11, -1, 0, 6, -1]
    given = torch.tensor(slots, dtype=slot_dtype, device=DEVICE)
    write_cache(wide[0], wide[1], cache[0], cache[1], given)
    want = torch.full_like(cache, -7.0)
    for token, slot in enumerate(slots):
        if slot >= 0:
            want[:, slot // 4, slot % 4] = wide[:, token]
    assert torch.equal(cache, want)
    assert not torch.equal(cache, torch.full_like(cache, -7.0))


def test_writing_no_token_changes_nothing() -> None:
    cache = torch.zeros(2, 3, 4, 2, 32, device=DEVICE)
    none = torch.zeros(0, 2, 32, device=DEVICE)
    write_cache(none, none, cache[0], cache[1], torch.zeros(0, dtype=torch.int64, device=DEVICE))
    assert not cache.any()


CACHE = torch.zeros(3, 16, 2, 32, device=DEVICE)
Q = torch.zeros(1, 4, 32, device=DEVICE)


def build(**changes: object) -> PagedAttention:
    settings = {"k_cache": CACHE, "v_cache": CACHE, "heads": 4, "scale": 1.0} | changes
    return PagedAttention(settings.pop("k_cache"), settings.pop("v_cache"), **settings)


def run(q: torch.Tensor, **changes: torch.Tensor) -> None:
    held = buffers(1, 1)
    build()(q, held.step, **changes)


@pytest.mark.parametrize(
    ("attempt", "complaint"),
    [
        (lambda: build(heads=3), "multiple of the 2 KV heads"),
        (lambda: build(heads=130), "at most 64"),
        (lambda: build(window=-1), "negative"),
        (lambda: build(sinks=torch.zeros(2, device=DEVICE)), "sinks must be"),
        (lambda: build(v_cache=CACHE[:2]), "got .* and "),
        (lambda: build(v_cache=CACHE.half()), "one floating dtype"),
        (lambda: build(k_cache=CACHE[..., :24], v_cache=CACHE[..., :24]), "head size"),
        (lambda: build(k_cache=CACHE[:, :, :1], v_cache=CACHE[:, :, :1]), "contiguous"),
        (lambda: run(Q[:, :2]), "q must be"),
        (lambda: run(Q.double()), "q must be"),
        (lambda: run(Q, out=Q[:0]), "out must be"),
        (lambda: write_cache(Q, Q, CACHE, CACHE, torch.zeros(1)), "k must be"),
        (lambda: write_cache(Q[:, :2], Q[:, :2], CACHE, CACHE, torch.zeros(1)), "integers"),
    ],
)
def test_what_does_not_fit_is_refused(attempt: Callable[[], object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        attempt()


def test_what_fits_is_not_refused() -> None:
    build()
    run(Q)


def test_reserved_scratch_does_not_move() -> None:
    scratch = Scratch(DEVICE)
    kernel = build(scratch=scratch)
    kernel.reserve(rows=8, context=2048)
    planes, stats = scratch.planes(rows=8, heads=4, dim=32, splits=kernel.splits(2048))
    assert kernel.splits(2048) == 8
    assert planes.data_ptr() == scratch.planes(rows=1, heads=4, dim=32, splits=1)[0].data_ptr()
    assert planes.numel() + stats.numel() == scratch.nbytes // 4
    scratch.planes(rows=9, heads=4, dim=32, splits=8)
    assert scratch.nbytes // 4 > planes.numel() + stats.numel()


@pytest.mark.parametrize("dim", [32, 128])
@pytest.mark.parametrize("kv_heads", [1, 8, 40])
def test_splits_cover_a_row_and_never_exceed_the_most_of_shorter_rows(
    dim: int, kv_heads: int
) -> None:
    for keys in [0, 1, 127, 128, 129, 5000, 8192, 8193, 131072, 1 << 20]:
        length, splits = configs.split_keys(keys, dim=dim, kv_heads=kv_heads)
        assert length * splits >= keys
        assert splits == 1 or length * (splits - 1) < keys
        for more in (keys, keys + 1, keys + 1000, 2 * keys):
            assert splits <= configs.most_splits(more, dim=dim, kv_heads=kv_heads)


def test_large_heads_take_a_stage_less_on_machines_of_less_shared_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stages(dim: int, capability: tuple[int, int]) -> int:
        monkeypatch.setattr(attention, "_capability", lambda device: capability)
        cache = torch.zeros(1, 16, 1, dim)
        return PagedAttention(cache, cache, heads=2, scale=1.0)._prefill_tiles.stages

    roomy, small = [(8, 0), (9, 0), (10, 0)], [(8, 6), (8, 9), (12, 0)]
    for dim in (192, 256):
        assert [stages(dim, capability) for capability in roomy + small] == [3, 3, 3, 2, 2, 2]
    assert [stages(128, capability) for capability in small] == [3, 3, 3]


def test_every_shipped_configuration_names_all_arguments_of_its_kernel() -> None:
    shipped = configs.shipped()
    assert {entry.kernel.__name__ for entry in shipped} == {
        "decode_kernel",
        "prefill_kernel",
        "reduce_kernel",
        "write_kernel",
    }
    for entry in shipped:
        assert sorted([*entry.signature, *entry.constexprs]) == sorted(entry.kernel.arg_names)
        assert entry.num_warps in (4, 8)
        assert 1 <= entry.num_stages <= 5


def test_rows_of_a_world_are_drawn_anew_by_seed() -> None:
    first: Row = make_row(SHAPE, 1, 5, seed=1)
    assert torch.equal(first.k, make_row(SHAPE, 1, 5, seed=1).k)
    assert not torch.equal(first.k, make_row(SHAPE, 1, 5, seed=2).k)
