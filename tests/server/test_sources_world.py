"""Real loads over the demo base: room is made, pins are asked for, settings that clash are told."""

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from fader_adapters.errors import (
    AdapterInvalid,
    AdapterNotFound,
    ArenaFull,
    SourceUnavailable,
)
from fader_adapters.source import CONFIG_FILE, WEIGHTS_FILE
from fader_server import config, demo, sourcing
from fader_server.api.adapter_ports import LoadOrder
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.errors import ConfigInvalid
from fader_server.launch import World
from fader_server.metrics import Metrics
from fader_server.registry import Registry
from fader_server.sourcing import check_sources, open_sources
from fader_server.world import open_world

NAMES = ("shout", "german", "json", "polite")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters one level deeper than a start looks."""
    root = tmp_path_factory.mktemp("root")
    for name in NAMES:
        shutil.copytree(demo.adapter_dirs()[name], root / "team" / name)
        path = root / "team" / name / CONFIG_FILE
        settings = json.loads(path.read_text())
        settings["lora_alpha"] += 1  # a version of its own, so that no memory is shared
        path.write_text(json.dumps(settings))
    return root


def opened(**flags: object):
    flags |= {"warm_up": "0", "threads": "1", "kv_cache": "4MiB"}
    return open_world(config.load(flags, {}), Metrics())


@pytest.fixture(scope="module")
def world(root: Path) -> Iterator[World]:
    """Two more names than the demo's own fit."""
    with opened(
        adapter_dir=[str(root)],
        resolve_adapters="true",
        max_adapters=str(len(demo.adapter_dirs()) + 2),
    ) as world:
        yield world


def lease(world: World, *names: str):
    return world.adapters.lease([NamedTerm(AdapterRef(name), 1.0) for name in names])


def loaded(world: World) -> set[str]:
    return {info.name for info in world.adapters.list()} - set(demo.adapter_dirs())


async def test_the_number_of_adapters_is_bounded_and_the_longest_unused_leaves(world: World):
    for name in NAMES:
        (await lease(world, f"team/{name}")).release()
    assert loaded(world) == {"team/json", "team/polite"}
    assert world.adapters.totals().host_evictions == 2
    held = await lease(world, "team/json")
    (await lease(world, "team/shout")).release()
    assert loaded(world) == {"team/json", "team/shout"}
    with pytest.raises(ArenaFull):
        await lease(world, "team/german", "team/polite", "team/shout")
    assert "team/json" in loaded(world)
    held.release()
    assert world.adapters.totals().leases == 0


async def test_bytes_are_bounded_and_come_back_from_the_device_before_a_load_fails(root: Path):
    with opened(adapter_dir=[str(root)], resolve_adapters="true") as probe:
        sizes = {info.name: info.bytes for info in probe.adapters.list()}
    room = sum(sizes.values()) + max(sizes.values())
    with opened(adapter_dir=[str(root)], resolve_adapters="true", arena=str(room)) as world:
        for name in NAMES * 2:
            (await lease(world, f"team/{name}")).release()
        assert world.adapters.totals().host_bytes <= room
        assert world.adapters.totals().host_evictions >= 4
        held = await lease(world, "team/shout")
        waiting = asyncio.create_task(lease(world, "team/german", "team/json"))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        held.release()
        (await waiting).release()
        with pytest.raises(ArenaFull):  # whatever ends
            await lease(world, *(f"team/{name}" for name in NAMES))


async def test_without_the_flag_nothing_loads_by_itself(root: Path):
    with opened(adapter_dir=[str(root)]) as world:
        with pytest.raises(AdapterNotFound):
            await lease(world, "team/shout")
        assert world.background == ()


async def test_folders_beyond_the_arena_are_known_and_served_in_turn(root: Path):
    """Four folders and the demo's adapters, whose place is theirs; room for two more."""
    small = root / "small"
    small.mkdir()
    for number in range(4):
        shutil.copytree(demo.adapter_dirs()["shout"], small / f"x{number}")
        written = json.loads((small / f"x{number}" / CONFIG_FILE).read_text())
        changed = json.dumps(written | {"lora_alpha": 3 + number})  # versions of their own
        (small / f"x{number}" / CONFIG_FILE).write_text(changed)
    with opened() as world:
        sizes = {info.name: info.bytes for info in world.adapters.list()}
    room = sum(sizes.values()) + 2 * sizes["shout"]
    with opened(adapter_dir=[str(small)], arena=str(room)) as world:
        known = {info.name: info for info in world.adapters.list()}
        assert {f"x{n}" for n in range(4)} <= known.keys()
        tiers = [known[f"x{n}"].tier for n in range(4)]
        assert tiers == ["disk", "disk", "host", "host"]
        for number in (0, 1, 2, 3, 0):
            held = await lease(world, f"x{number}")
            info = world.adapters.get(AdapterRef(f"x{number}"))
            assert (info.tier, info.version) == ("host", known[f"x{number}"].version)
            held.release()
        assert {world.adapters.get(AdapterRef(name)).tier for name in sizes} == {"host"}


async def test_with_require_sha256_a_load_needs_the_version_and_a_start_does_not(root: Path):
    named = [f"mine={root / 'team' / 'shout'}"]
    with opened(adapter_dir=[str(root)], adapter=named, require_sha256="true") as world:
        version = world.adapters.get(AdapterRef("mine")).version
        for source in ("team/shout", "absent"):
            with pytest.raises(AdapterInvalid, match="sha256"):
                await world.adapters.load(LoadOrder("x", source))
        done = await world.adapters.load(LoadOrder("x", "team/shout", sha256=version))
        assert done.info.version == version


async def test_urls_under_a_prefix_load_and_a_hanging_store_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    memory = fsspec.filesystem("memory")
    folder = demo.adapter_dirs()["shout"]
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        memory.pipe(f"memory://bucket/shout/{name}", (folder / name).read_bytes())
    monkeypatch.setattr("fader_server.reading._FETCH_MARGIN", 0.0)
    flags = {"adapter_url": ["memory://bucket"], "cache_dir": str(tmp_path)}
    with opened(**flags) as world:
        done = await world.adapters.load(LoadOrder("x", "memory://bucket/shout"))
        assert done.info.version == world.adapters.get(AdapterRef("shout")).version
        assert any((tmp_path / "blobs").iterdir())
        registry = world.adapters._inner._inner
        assert isinstance(registry, Registry)
        release = threading.Event()

        def hang(*arguments: object) -> None:
            release.wait(10)
            raise RuntimeError("nobody gave it up")

        monkeypatch.setattr(registry._reader, "_fetch_timeout", 0.05)
        monkeypatch.setattr(registry._reader._sources, "fetch_remote", hang)
        with pytest.raises(SourceUnavailable, match="time"):
            await world.adapters.load(LoadOrder("y", "memory://bucket/shout"))
        release.set()
    memory.store.clear()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"watch_adapters": "1"}, "--watch-adapters: .*--adapter-dir"),
        ({"resolve_adapters": "1"}, "--resolve-adapters: .*--adapter-dir or --adapter-hub"),
        ({"adapter_dir": ["/no/such/root"]}, "--adapter-dir /no/such/root"),
        ({"adapter": ["x=/no/such/adapter"]}, "--adapter x: no such folder"),
        ({"adapter": ["x=one"]}, "--adapter x: no such folder"),
    ],
)
def test_settings_without_what_they_need_are_told_early(flags, reason):
    with pytest.raises(ConfigInvalid, match=reason):
        check_sources(config.load(flags, {}))


@pytest.mark.parametrize("other", ["resolve_adapters", "watch_adapters"])
def test_loads_without_a_sha256_clash_with_requiring_one(other):
    with pytest.raises(ConfigInvalid, match=f"--{other.replace('_', '-')} .*--require-sha256"):
        config.load({other: "1", "require_sha256": "1"}, {})


def test_a_store_whose_package_is_missing_or_unknown_stops_the_start(tmp_path, monkeypatch):
    flags = {"adapter_url": ["nosuch://bucket/x"], "cache_dir": str(tmp_path)}
    with pytest.raises(ConfigInvalid, match="--adapter-url: nosuch://"):
        open_sources(config.load(flags, {}))

    def missing(protocol: str, **options: object):
        raise ImportError("Install s3fs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    flags["adapter_url"] = ["s3://bucket/x"]
    with pytest.raises(ConfigInvalid, match=r"pip install 'fader\[remote\]'"):
        open_sources(config.load(flags, {}))


def test_a_cache_folder_that_cannot_be_made_stops_the_start(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    flags = {"adapter_hub": ["org"], "cache_dir": str(tmp_path / "file" / "cache")}
    with pytest.raises(ConfigInvalid, match=r"--cache-dir .*give a folder"):
        open_sources(config.load(flags, {}))


def test_no_remote_source_makes_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(sourcing, "DiskCache", None)
    open_sources(config.load({"adapter_dir": [str(tmp_path)]}, {}))
    with pytest.raises(TypeError):
        open_sources(config.load({"adapter_hub": ["org"]}, {}))


@pytest.mark.parametrize(
    ("flags", "env", "folder"),
    [
        ({"cache_dir": "/c", "state_dir": "/s"}, {"XDG_CACHE_HOME": "/x"}, "/c"),
        ({"state_dir": "/s"}, {"XDG_CACHE_HOME": "/x"}, "/s/fetched"),
        ({}, {"XDG_CACHE_HOME": "/x"}, "/x/fader/adapters"),
        ({}, {"XDG_CACHE_HOME": "relative"}, "~/.cache/fader/adapters"),
        ({}, {}, "~/.cache/fader/adapters"),
    ],
)
def test_where_fetched_adapters_are_kept(flags, env, folder):
    assert config.load(flags, env).fetched_dir == Path(folder).expanduser()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"adapter_hub": ["a/b/c"]}, "--adapter-hub"),
        ({"adapter_hub": [""]}, "--adapter-hub"),
        ({"adapter_url": ["file:///srv"]}, "--adapter-url"),
        ({"adapter_url": ["/srv"]}, "--adapter-url"),
        ({"adapter_url": ["s3://"]}, "--adapter-url"),
        ({"max_adapters": "0"}, "--max-adapters"),
        ({"adapter_cache": "0"}, "--adapter-cache"),
    ],
)
def test_wrong_values_are_named(flags, named):
    with pytest.raises(ConfigInvalid, match=named):
        config.load(flags, {})
