"""`fader serve --device cuda` on the pretended device: its own world, its engine's thread, HTTP's
routes, loads and merges beside streams."""

import asyncio
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_adapters.kernels.backend import BaseLinear
from fader_adapters.kernels.cuda.backend import CudaBackend
from fader_adapters.kernels.cuda.nf4 import Nf4Linear
from fader_server import demo
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.api.merge_ports import MergeOrder
from fader_server.model import graphs
from fader_server.model.launching import LaunchingRunner
from tests.server.served_world import Served, served
from tests.support.families import CONFIGS, write_family
from tests.support.peft_adapters import write_adapter
from tests.support.pretend_cuda import PretendDevice, unavailable
from tests.support.pretend_cuda.setting import SMALL, on_device

pytestmark = [
    pytest.mark.skipif(bool(unavailable()), reason=unavailable()),
    pytest.mark.slow,
]

FLAGS = {
    "device": "cuda",
    "dtype": "float32",
    "served_model_name": "base",
    "max_batch_rows": "2",
    "max_step_tokens": "50",
    "max_model_len": "64",
    "arena": "96KiB",
}
QUESTION = {"prompt": "What colour is the sky?", "max_tokens": 3}
MODELS = ("base", "a", "ends")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A base of one small layer with the demo's tokenizer, and a folder of adapters."""
    config = LlamaConfig(**SMALL | {"vocab_size": 1280}, tie_word_embeddings=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "llama", lambda: config)
        base = write_family("llama", tmp_path / "base")
    for found in demo.base_dir().glob("*token*"):
        shutil.copy(found, base)
    ends = {"target_modules": ["embed_tokens", "o_proj"]}
    write_adapter(base, tmp_path / "adapters/a", rank=8, seed=1)
    write_adapter(base, tmp_path / "adapters/ends", rank=4, seed=2, **ends)
    return tmp_path


@pytest.fixture
async def want(root: Path) -> dict[str, Any]:
    """What the CPU's server says."""
    flags = FLAGS | {"device": "cpu", "arena": "8MiB", "model": str(root / "base")}
    async with served(root / "adapters", **flags) as server:
        return {model: (await server.said(model, **QUESTION)).scored for model in MODELS}


@pytest.fixture
def device(want: dict[str, Any]) -> Iterator[PretendDevice]:
    with on_device(total=8 << 30) as found:
        yield found


async def test_a_server_loads_answers_swaps_and_merges(
    root: Path, want: dict[str, Any], device: PretendDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fader_server.mergestart.PROBE_TOKENS", 20)
    monkeypatch.setattr("fader_server.pacing.REST", 0.0)
    async with served(root / "adapters", **FLAGS, model=str(root / "base")) as server:
        runner = server.engine._stepper._runner
        assert isinstance(runner, LaunchingRunner)
        assert isinstance(runner._base.backend, CudaBackend)
        assert isinstance(runner._replays, graphs.DecodeGraphs)
        await same(server, want)
        for form in ("bf16", "nf4"):
            await merge(server, {"a": 1.0}, form, meanwhile=want)
            merged = server.engine.stats().merged
            assert made_aside(runner, device), "or the engine's steps would be waited for"
            await same(server, want if form == "bf16" else {"ends": want["ends"]})
            await server.said("a", **QUESTION)
            assert server.engine.stats().merged > merged
        await server.put("again", "ends")
        await same(server, {"again": want["ends"], "base": want["base"]})
        merging = server.world.merging
        assert merging is not None
        await merging.drop()
        await same(server, want)
    assert device.replays


def made_aside(runner: LaunchingRunner, device: PretendDevice) -> bool:
    """Whether a lane's weights were not taken on the stream of the engine's steps."""
    (lane,) = runner._lanes.values()
    assert lane.lane is not None
    return all(owner(base) != device.default.number for base in lane.lane.bases.values())


def owner(base: BaseLinear) -> int:
    """The stream that a weight was taken on."""
    held = base.tiles.codes if isinstance(base, Nf4Linear) else vars(base)["weight"]
    return held.home.owner


async def same(server: Served, want: Mapping[str, Any]) -> None:
    """All of these at once are answered as they were by the CPU's server."""
    asked = await asyncio.gather(*[server.said(model, **QUESTION) for model in want])
    for said, expected in zip(asked, want.values(), strict=True):
        assert [token for token, _ in said.scored] == [token for token, _ in expected]
        told = [logprob for _, logprob in expected]
        assert [logprob for _, logprob in said.scored] == pytest.approx(told, abs=1e-4)


async def merge(
    server: Served, blend: Mapping[str, float], form: str, *, meanwhile: Mapping[str, Any]
) -> None:
    """Merge while requests run."""
    merging = server.world.merging
    assert merging is not None
    terms = [NamedTerm(AdapterRef(name), weight) for name, weight in blend.items()]
    order = MergeOrder(form=form, force=True)  # pyright: ignore[reportArgumentType]
    await merging.start(order, server.world.adapters.acquire(terms))
    while (job := merging.status().job) is not None:
        assert not job.reason, job
        await same(server, {"base": meanwhile["base"], "ends": meanwhile["ends"]})
    lane = merging.status().lane
    assert lane is not None
    assert lane.form == form
