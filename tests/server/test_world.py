"""What `fader serve` opens, and how it refuses."""

import errno
import logging
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from fader_adapters.errors import AdapterMismatch, AdapterTooLarge
from fader_adapters.kernels import native
from fader_adapters.source import WEIGHTS_FILE
from fader_server import assembly, config, demo
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.assembly import host_tier
from fader_server.core import Request, SamplingParams, TokenEvent
from fader_server.errors import ConfigInvalid, ModelUnsupported
from fader_server.metrics import Metrics
from fader_server.text.tokenizer import Tokenizer
from fader_server.world import open_world
from tests.support.families import write_family
from tests.support.peft_adapters import write_adapter
from tests.support.pretend_cuda import pretend, unavailable


def _open(**flags: object):
    flags = {"warm_up": "0", "kv_cache": "16MiB"} | flags | {"threads": "1"}
    return open_world(config.load(flags, {}), Metrics())


def _generate(world, adapter: str | None) -> list[int]:
    terms = [] if adapter is None else [NamedTerm(AdapterRef(adapter), 1.0)]
    lease = world.adapters.acquire(terms)
    prompt = tuple(world.tokenizer.encode_chat([{"role": "user", "content": "Hello"}]))
    params = SamplingParams(temperature=0, max_tokens=8)
    request = Request("r", prompt, params, lease.blend, lease.adapters)
    events: list[TokenEvent] = []
    done = threading.Event()

    def sink(event: TokenEvent) -> None:
        events.append(event)
        if event.finish or event.error:
            done.set()

    world.engine.submit(request, sink)
    assert done.wait(60)
    lease.release()
    return [event.token for event in events if event.token is not None]


def test_without_a_model_the_demo_is_served_with_its_adapters():
    with _open(kv_cache=None) as world:
        assert world.base.name == demo.SERVED_NAME
        assert {info.name for info in world.adapters.list()} == set(demo.adapter_dirs())
        assert _generate(world, None) != _generate(world, "shout")


RECORDS = pytest.mark.skipif(not native.available(), reason=native.reason() or "built")


@pytest.mark.parametrize("seconds", [pytest.param("60", marks=RECORDS), "0"])
def test_a_start_warms_up_when_it_may_and_leaves_no_trace(seconds, caplog):
    with caplog.at_level(logging.INFO), _open(warm_up=seconds) as world:
        stats = world.engine.stats()
        assert (stats.steps, stats.generated, stats.kv_used, stats.kv_cached) == (0, 0, 0, 0)
        assert _generate(world, "shout")
    told = [r.fields for r in caplog.records if r.message == "warmed up"]
    assert bool(told) == (seconds == "60")
    assert not told or (told[0]["steps"] > 64 and 0 < told[0]["seconds"] < 60)


def test_the_memory_plan_is_told_once_in_bytes(caplog):
    with caplog.at_level(logging.INFO), _open(arena="8MiB", kv_cache="4MiB"):
        (plan,) = [r.fields for r in caplog.records if r.message == "memory plan"]
    assert plan["arena_bytes"] == 8 << 20
    assert 3 << 20 < plan["kv_cache_bytes"] <= 4 << 20
    assert plan["total_bytes"] == sum(plan[k] for k in plan if k.endswith("_bytes")) / 2


def test_how_the_base_writes_calls_of_tools_is_told_once(caplog):
    with caplog.at_level(logging.INFO), _open() as world:
        (told,) = [r.fields for r in caplog.records if r.message == "calls of tools"]
    assert isinstance(world.tokenizer, Tokenizer)
    assert told == world.tokenizer.calls_told


def test_gateways_are_told_what_the_arena_can_hold_not_what_is_there():
    """One that reads max_lora takes a server with as many running adapters for a full one."""
    found = {}
    for arena in ("2MiB", "8MiB"):
        with _open(arena=arena) as world:
            infos = world.adapters.list()
            each = sum(info.bytes for info in infos) / len(infos)
            found[arena] = world.adapters.totals().slots * each / (1 << 20)
            for info in infos:
                world.adapters.unload(info.name)
            patience = time.monotonic() + 10
            while world.adapters.totals().host_bytes and time.monotonic() < patience:
                time.sleep(0.01)  # the engine lets go of them between steps
            assert world.adapters.totals().slots == 1
    assert found == {"2MiB": pytest.approx(2, abs=0.2), "8MiB": pytest.approx(8, abs=0.2)}


def test_an_adapter_of_another_base_stops_the_start_when_it_was_named(tmp_path):
    base = write_family("llama", tmp_path / "base")
    other = write_adapter(base, tmp_path / "other", rank=4, seed=1)
    with (
        pytest.raises(ConfigInvalid, match="--adapter other: ") as caught,
        _open(adapter=[f"other={other}"]),
    ):
        pass
    assert isinstance(caught.value.__cause__, AdapterMismatch)


def test_an_adapter_of_another_base_in_a_folder_is_skipped_aloud(tmp_path, caplog):
    base = write_family("llama", tmp_path / "base")
    root = tmp_path / "root"
    write_adapter(base, root / "stranger", rank=4, seed=1)
    shutil.copytree(demo.adapter_dirs()["shout"], root / "friend")
    (root / "bad name").mkdir()
    (root / ".hidden").mkdir()
    (root / "README.md").touch()
    with caplog.at_level(logging.WARNING), _open(adapter_dir=[str(root)]) as world:
        names = {info.name for info in world.adapters.list()}
    assert names == {"friend", *demo.adapter_dirs()}
    skipped = [r.fields for r in caplog.records if r.message == "adapter skipped"]
    assert [fields["adapter"] for fields in skipped] == ["bad name", "stranger"]
    assert all(fields["reason"] for fields in skipped)


@pytest.mark.parametrize("code", [errno.EIO, None])
def test_a_folder_that_cannot_be_read_is_skipped_and_left_to_the_watcher(
    tmp_path, caplog, monkeypatch, code
):
    root = tmp_path / "root"
    shutil.copytree(demo.adapter_dirs()["shout"], root / "friend")
    inode, read = os.stat(root / "friend" / WEIGHTS_FILE).st_ino, os.read

    def fail(fd: int, size: int) -> bytes:
        if code is not None and os.fstat(fd).st_ino == inode:
            raise OSError(code, os.strerror(code))
        return read(fd, size)

    monkeypatch.setattr("fader_adapters.source.os.read", fail)
    options = {"adapter_dir": [str(root)], "watch_adapters": True}
    with caplog.at_level(logging.WARNING), _open(**options) as world:
        names = {info.name for info in world.adapters.list()}
        (watching,) = world.background
        seen = watching.func.__self__._seen  # type: ignore[attr-defined]
    assert ("friend" in names, "friend" in seen) == (code is None, code is None)
    skipped = [r.fields["reason"] for r in caplog.records if r.message == "adapter skipped"]
    assert ["EIO" in reason for reason in skipped] == ([True] if code else [])


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"model": "no-such-folder"}, "no model at"),
        ({"model": "/no/such/folder"}, "no model at '/no/such/folder': no such folder"),
        ({"model": "models/no/such"}, "no model at 'models/no/such': no such folder"),
        ({"model": "models/"}, "no model at 'models/': no such folder"),
        ({"model": ".models"}, "no model at '.models': no such folder"),
        ({"arena": "12"}, r"the demo's adapter \w+: .* needs \d+ bytes.*\(--arena\)"),
        ({"adapter": ["x=/no/such/adapter"]}, "--adapter x: .*/no/such/adapter"),
        ({"adapter_dir": ["/no/such/root"]}, "--adapter-dir /no/such/root"),
        ({"served_model_name": "shout"}, "--served-model-name shout"),
        ({"max_model_len": "100000"}, "--max-model-len 100000: the base has 1024 positions"),
        ({"max_step_tokens": "64"}, "--max-step-tokens 64 .*--max-batch-rows 64"),
        ({"adapter": [f"{demo.SERVED_NAME}=/no"]}, "the base has this name"),
        ({"kv_cache": "1KiB", "max_model_len": "512"}, "--kv-cache"),
        ({"arena": "8TiB"}, "ask for less"),
        ({"max_batch_rows": "600"}, "--max-batch-rows|--max-step-tokens"),
    ],
)
def test_what_the_user_can_mend_is_told_in_one_line(flags, reason, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigInvalid, match=reason) as caught, _open(**flags):
        pass
    assert "\n" not in str(caught.value)


def test_a_named_adapter_that_the_arena_cannot_hold_is_told_with_both_flags(tmp_path: Path):
    base = demo.base_dir()
    shout = demo.adapter_dirs()["shout"]
    flags = {"model": str(base), "adapter": [f"loud={shout}"]}
    with (
        pytest.raises(ConfigInvalid, match=r"^--adapter loud: .*\(--arena\)$"),
        _open(**flags, arena="12"),
    ):
        pass
    with _open(**flags, arena="2MiB") as world:
        (info,) = world.adapters.list()
        assert info.name == "loud"


@pytest.mark.parametrize(("served", "verdict"), [("org/Fader-Demo", "named"), ("other", "other")])
def test_an_adapter_that_names_the_base_as_it_is_served_is_no_stranger(served, verdict):
    flags = {"model": str(demo.base_dir()), "served_model_name": served}
    shout = demo.adapter_dirs()["shout"]
    with _open(**flags, adapter=[f"loud={shout}"]) as world:
        (info,) = world.adapters.list()
        assert info.health is not None
        assert info.health.match.verdict == verdict


def test_the_demos_own_adapters_are_no_strangers_under_any_name():
    with _open(served_model_name="mine") as world:
        assert {info.health.match.verdict for info in world.adapters.list()} == {"named"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_device_is_a_mistake_of_the_user():
    with pytest.raises(ConfigInvalid, match="--device cpu"), _open(device="cuda"):
        pass


def test_a_base_without_tokenizer_is_refused_by_name(tmp_path: Path):
    base = write_family("llama", tmp_path / "base")
    with pytest.raises(ModelUnsupported, match="tokenizer"), _open(model=str(base)):
        pass


def test_host_memory_that_is_asked_for_in_vain_is_told_once(caplog):
    arena = torch.empty(8)
    host_tier(arena, None)
    assert not caplog.records
    host_tier(arena, 1 << 20)
    (line,) = caplog.records
    assert line.getMessage() == "--host-adapters changes nothing"
    assert "--arena" in line.fields["reason"]


@pytest.mark.skipif(bool(unavailable()), reason=unavailable())
def test_beside_a_gpu_the_host_locks_what_it_was_told_at_start_and_gives_it_back():
    with pretend() as device:
        arena = torch.empty(3 * 512, dtype=torch.bfloat16, device="cuda")
        tier = host_tier(arena, None)
        assert tier.total_bytes == device.host.registered == 4 * 3072
        flat = tier.allocate(3 * 512)
        assert flat is not None
        assert flat.is_pinned()
        arena.copy_(flat, non_blocking=True)
        assert device.host.pinned == 0, "torch's allocator rounds up and keeps what was freed"
        with pytest.raises(AdapterTooLarge, match="3076 bytes"):
            tier.allocate(3 * 512 + 2)
        tier = host_tier(arena, 9 << 10)
        assert tier.total_bytes == device.host.registered == 9 << 10
        assert host_tier(arena, 0).total_bytes == 0
        device.synchronize()


@pytest.mark.skipif(bool(unavailable()), reason=unavailable())
def test_beside_a_gpu_a_host_that_cannot_lock_so_much_is_told_at_start(caplog):
    with pretend() as device:
        arena = torch.empty(1 << 10, dtype=torch.bfloat16, device="cuda")
        device.host.room = 1 << 12
        with pytest.raises(ConfigInvalid, match=r"--host-adapters 8192: .*code 2.*ask for less"):
            host_tier(arena, 1 << 13)
        assert not caplog.records
        tier = host_tier(arena, None)
        assert tier.total_bytes == 1 << 13
        flat = tier.allocate(8)
        assert flat is not None
        assert not flat.is_pinned()
        assert "not locked" in caplog.text
        assert host_tier(arena, 1 << 12).total_bytes == 1 << 12


def test_by_default_the_host_keeps_half_of_its_free_memory(monkeypatch):
    monkeypatch.setattr(assembly, "free_bytes", lambda device: 1 << 20)
    assert assembly._host_default(1 << 10) == 4 << 10
    assert assembly._host_default(1 << 20) == 1 << 19


def test_on_a_cpu_adapters_rest_in_the_arena():
    on_cpu = torch.empty(1024, dtype=torch.bfloat16)
    assert host_tier(on_cpu, 1 << 20).total_bytes == 2048
