"""The server's engine over the Triton attention: same answers as transformers + PEFT."""

from pathlib import Path

import pytest
import torch

from fader_server.engine.limits import Limits
from fader_server.model.attention import AttentionParams
from fader_server.model.batch import AttentionRow, Batch
from fader_server.model.cuda_attention import CudaAttention, obstacle
from fader_server.model.kv_cache import LayerCache, LayerShape
from fader_server.model.loaded import LoadedBase
from fader_server.model.torch_attention import TorchAttention
from tests.adapters.cuda.attention_world import DEVICE, Shape, World, make_row
from tests.server.parity.test_families import BOUND, Setting, check, mixed
from tests.support import world as support
from tests.support.families import CONFIGS
from tests.support.world import CPU

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny engine is on the CPU")


def use_triton(patch: pytest.MonkeyPatch, chosen: list[CudaAttention]) -> None:
    def choose(base: LoadedBase, *, block_size: int) -> CudaAttention:
        assert block_size == 16
        assert not obstacle(base.layers.values(), base.dtype)
        chosen.append(CudaAttention(max_rows=32, max_context=512, device=CPU))
        return chosen[-1]

    patch.setattr(support, "choose_attention", choose)


def serve(family: str, folder: Path, patch: pytest.MonkeyPatch, count: int) -> None:
    chosen: list[CudaAttention] = []
    use_triton(patch, chosen)
    setting = Setting(family, folder, torch.float32)
    limits = Limits(max_rows=16, max_step_tokens=48, chunk_size=16, max_model_len=512)
    world = setting.world(limits=limits)
    asks = mixed(count)
    check(setting.oracle, asks, world.run(asks), BOUND[torch.float32])
    assert any({r.count == 1 for r in p.rows} == {True, False} for p in world.plans)
    assert chosen[0].nbytes > 0


@pytest.mark.slow
@interpreted
def test_chunks_and_decode_of_a_capped_and_windowed_model_equal_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve("gemma2", tmp_path, monkeypatch, 4)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_equals_peft(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(family, tmp_path, monkeypatch, 16)


def batch_of(world: World) -> Batch:
    sizes = zip(world.starts, (row.q.shape[0] for row in world.rows), world.contexts, strict=False)
    slots = [
        world.places(table, row.context)[-row.q.shape[0] :]
        for row, table in zip(world.rows, world.tables, strict=True)
    ]
    none = torch.zeros(1, world.starts[-1], dtype=torch.int64)
    width = max(map(len, world.tables))
    return Batch(
        input_ids=none,
        position_ids=none,
        slots=torch.cat(slots).to(DEVICE),
        cu_tokens=world.ints(world.starts),
        contexts=world.ints(world.contexts),
        block_tables=world.table_tensor()[:, :width].clamp(max=world.k.shape[0] - 1),
        logit_index=none[0],
        rows=tuple(AttentionRow(*size) for size in sizes),
        sampling=(),
        scored=(),
    )


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("sizes", [[(1, 30), (1, 300)], [(20, 40), (2, 2)], [(1, 30), (9, 33)]])
def test_the_step_of_a_batch_attends_as_plain_torch_does(
    sizes: list[tuple[int, int]], sinks: bool
) -> None:
    shape = Shape(heads=4, kv_heads=2, dim=32, window=28, softcap=20.0, sinks=sinks)
    world = World(shape, [make_row(shape, *size, seed) for seed, size in enumerate(sizes)])
    batch = batch_of(world)
    params = AttentionParams(shape.scale, shape.window, shape.softcap, shape.sink_scores)
    caches = [LayerCache(torch.full_like(world.k, torch.nan), world.v.clone()) for _ in range(2)]
    attention = CudaAttention(max_rows=4, max_context=512, device=DEVICE)
    for cache in caches:
        cache.k.copy_(world.k)
        flat = cache.k.view(-1, 2, 32)
        flat[batch.slots] = torch.nan
    results = []
    for backend, cache in zip((attention, TorchAttention(16)), caches, strict=True):
        new = [torch.cat([r.k[-r.q.shape[0] :] for r in world.rows])]
        new += [torch.cat([r.v[-r.q.shape[0] :] for r in world.rows])]
        backend.write(new[0], new[1], cache, batch.slots)
        cache.k[~cache.k.isfinite()], cache.v[~cache.v.isfinite()] = 0, 0
        results.append(backend.attend(world.q, cache, params, backend.prepare(batch)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    before = attention.nbytes
    attention.attend(world.q, caches[0], params, attention.prepare(batch))
    assert attention.nbytes == before
    assert attention.prepare(batch).decodes == any(count == 1 for count, _ in sizes)
    assert attention.prepare(batch).prefills == any(count > 1 for count, _ in sizes)


@pytest.mark.parametrize(
    ("dims", "fit"), [((128, 128), True), ((272, 272), False), ((40, 40), False), ((64, 32), False)]
)
def test_only_head_sizes_the_kernels_take_fit(dims: tuple[int, int], fit: bool) -> None:
    told = obstacle([LayerShape(2, 64, 64), LayerShape(2, *dims)], torch.bfloat16)
    assert (not told) is fit


def test_on_a_gpu_fp32_attends_in_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [LayerShape(2, 64, 64)]
    assert not obstacle(shapes, torch.float32)  # interpreted
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    assert "bfloat16" in obstacle(shapes, torch.float32)
    assert not obstacle(shapes, torch.float16)
