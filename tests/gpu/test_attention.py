"""Paged attention on a real GPU in bf16: float64 parity, bits, captured graphs."""

import dataclasses
import itertools

import pytest
import torch

from tests.adapters.cuda.attention_world import Shape, World, dense, error, make_row

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

TOLERANCE = 1e-2
"""Weights and values are rounded to bf16 before their product, results after it."""

LLAMA = Shape(heads=32, kv_heads=8, dim=128, dtype=torch.bfloat16)
GPT_OSS = Shape(heads=64, kv_heads=8, dim=64, dtype=torch.bfloat16, sinks=True)
SHAPES = [
    LLAMA,
    dataclasses.replace(LLAMA, window=300),
    Shape(heads=28, kv_heads=4, dim=128, dtype=torch.bfloat16),
    Shape(heads=32, kv_heads=32, dim=80, dtype=torch.bfloat16),
    Shape(heads=32, kv_heads=32, dim=96, dtype=torch.bfloat16, window=2047),
    Shape(heads=16, kv_heads=8, dim=256, dtype=torch.bfloat16, softcap=50.0, window=512),
    Shape(heads=8, kv_heads=1, dim=256, dtype=torch.bfloat16),
    Shape(heads=32, kv_heads=8, dim=64, dtype=torch.bfloat16),
    Shape(heads=8, kv_heads=2, dim=32, dtype=torch.bfloat16, softcap=30.0),
    Shape(heads=24, kv_heads=8, dim=128, dtype=torch.bfloat16, softcap=20.0),
    GPT_OSS,
    dataclasses.replace(GPT_OSS, window=128),
    dataclasses.replace(LLAMA, sinks=True),
]
SIZES = [(1, 1), (1, 16), (1, 17), (1, 2049), (1, 9000), (700, 700), (65, 1500), (2, 33), (1, 128)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mixed_steps_match_float64_in_bf16(shape: Shape) -> None:
    from tests.adapters.cuda.attention_runs import attend

    world = World(shape, [make_row(shape, *size, seed) for seed, size in enumerate(SIZES)])
    for row, got in zip(world.rows, attend(world), strict=True):
        assert error(got, dense(shape, row)) < TOLERANCE
    others = [attend(world, scale=shape.scale * 1.2)]
    if shape.sinks:
        others.append(attend(world, sinks=None))
    for wrong in others:
        assert max(map(error, wrong, (dense(shape, row) for row in world.rows))) > 2 * TOLERANCE


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [(1, 40), (1, 3000), (100, 500)])
def test_a_row_has_the_same_bits_alone_and_in_company(shape: Shape, size: tuple[int, int]) -> None:
    from tests.adapters.cuda.attention_runs import attend

    row = make_row(shape, *size, seed=90)
    others = [make_row(shape, *other, seed) for seed, other in enumerate(SIZES)]
    (alone,) = attend(World(shape, [row]), context=20000)
    mixed = attend(World(shape, [*others[:4], row, *others[4:]]))[4]
    assert torch.equal(alone, mixed)
    many = attend(World(shape, [make_row(shape, 1, 9, 7)] * 63 + [row]))[63]
    assert torch.equal(alone, many)
    assert not torch.equal(alone, attend(World(shape, [make_row(shape, *size, seed=91)]))[0])


@pytest.mark.parametrize("shape", [LLAMA, SHAPES[1], SHAPES[5], SHAPES[-2]], ids=str)
def test_a_prompt_has_the_same_bits_in_one_chunk_and_in_three(shape: Shape) -> None:
    from tests.adapters.cuda.attention_runs import attend
    from tests.adapters.cuda.attention_world import Row

    whole = make_row(shape, 900, 900, seed=3)
    cuts = [0, 333, 512, 900]
    parts = [Row(whole.q[a:b], whole.k[:b], whole.v[:b]) for a, b in itertools.pairwise(cuts)]
    chunks = torch.cat(attend(World(shape, parts)))
    assert torch.equal(chunks, attend(World(shape, [whole]))[0])


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_captured_step_gives_the_bits_of_an_eager_one(mixed: bool, sinks: bool) -> None:
    from fader_adapters.kernels.cuda.attention import PagedAttention, write_cache
    from fader_adapters.kernels.cuda.attention_step import StepBuffers
    from tests.adapters.cuda.attention_runs import attend

    shape, tokens = dataclasses.replace(LLAMA, sinks=sinks), 300 if mixed else 8
    device = torch.device("cuda")
    held = StepBuffers(rows=8, tokens=tokens, columns=640, block_size=16, device=device)
    place = (700, 16, LLAMA.kv_heads, LLAMA.dim)
    k = torch.zeros(place, dtype=LLAMA.dtype, device=device)
    v = torch.zeros_like(k)
    attention = PagedAttention(k, v, heads=LLAMA.heads, scale=LLAMA.scale, sinks=shape.sink_scores)
    q = torch.zeros(tokens, LLAMA.heads, LLAMA.dim, dtype=LLAMA.dtype, device=device)
    new = torch.zeros(2, tokens, *place[2:], dtype=LLAMA.dtype, device=device)
    out = torch.zeros_like(q)

    def forward() -> None:
        write_cache(new[0], new[1], k, v, held.slots)
        attention(q, held.step, out=out)

    attention.reserve(rows=9, context=640 * 16)
    forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    steps = [[(1, 100)], [(1, 9000), (1, 5), (1, 17)], [(1, 1)] * 8]
    if mixed:
        steps += [[(1, 100), (250, 260), (1, 400)], [(150, 150), (150, 700)]]
    for seed, sizes in enumerate(steps):
        rows = [make_row(shape, *size, 10 * seed + i) for i, size in enumerate(sizes)]
        world = World(shape, rows)
        slots = [
            world.places(table, row.context)[-row.q.shape[0] :]
            for row, table in zip(rows, world.tables, strict=True)
        ]
        k[: world.k.shape[0]], v[: world.k.shape[0]] = world.k, world.v
        flat = torch.cat(slots).to(device)
        k.view(-1, *place[2:])[flat] = torch.nan
        v.view(-1, *place[2:])[flat] = torch.nan
        used = world.starts[-1]
        q.fill_(torch.nan)
        out.fill_(torch.nan)
        q[:used] = world.q
        new[0, :used] = torch.cat([row.k[-row.q.shape[0] :] for row in rows])
        new[1, :used] = torch.cat([row.v[-row.q.shape[0] :] for row in rows])
        held.fill(world.starts, world.contexts, world.tables, flat.tolist())
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out[:used], torch.cat(attend(world)))
        assert (out[used:] == 0).all()
