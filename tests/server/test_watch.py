"""Roots that change under a server: add, replace, remove, half-written, and names of others."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from fader_adapters.errors import (
    AdapterNotFound,
    ArenaFull,
    NameReserved,
    SourceUnavailable,
    VersionConflict,
)
from fader_adapters.source import CONFIG_FILE, WEIGHTS_FILE, LocalSources
from fader_server.api.adapter_ports import AdapterInfo, Loaded, LoadOrder
from fader_server.api.blends import AdapterRef
from fader_server.watch import Seen, Watcher, changes_in
from tests.adapters.peft_files import make_raw, make_tensors, read, write_files

ONE, TWO = make_raw(), make_raw(tensors=make_tensors(seed=1))
V1, V2 = (read(raw).spec.version for raw in (ONE, TWO))


class Names:
    """The registry's part: really reads and checks the folder."""

    def __init__(self, sources: LocalSources) -> None:
        self.sources = sources
        self.infos: dict[str, AdapterInfo] = {}
        self.tried = 0
        self.full = False
        self.failures: dict[str, Exception] = {}
        self.reserved: set[str] = set()
        self.changed = asyncio.Event()

    async def load(self, order: LoadOrder) -> Loaded:
        self.tried += 1
        try:
            return self._load(order)
        finally:
            self.changed.set()

    def _load(self, order: LoadOrder) -> Loaded:
        if self.full:
            raise ArenaFull("no room")
        if order.name in self.failures:
            raise self.failures[order.name]
        if order.name in self.reserved:
            raise NameReserved("a recipe has the name")
        parsed = read(self.sources.fetch(order.source))
        old = self.infos.get(order.name)
        if order.if_version is not None and order.if_version != (old.version if old else ""):
            raise VersionConflict("moved")
        self.put(order.name, parsed.spec.version, order.source, pinned=order.pin)
        return Loaded(self.infos[order.name], old.version if old else None)

    def put(self, name: str, version, source: str, *, pinned: bool = False) -> None:
        self.infos[name] = AdapterInfo(
            name, version, 4, (2.0,), 9, ("q_proj",), 1, "host", 0, pinned, source=source
        )

    def unload(self, name: str) -> None:
        self.get(AdapterRef(name))
        del self.infos[name]
        self.changed.set()

    def get(self, ref: AdapterRef) -> AdapterInfo:
        if ref.name not in self.infos:
            raise AdapterNotFound(ref.name)
        return self.infos[ref.name]

    @property
    def versions(self) -> dict[str, str]:
        return {name: info.version for name, info in self.infos.items()}


class Place:
    """A root, the names and a watcher over both."""

    def __init__(self, tmp_path, *, seen=None, reserved=()) -> None:
        self.root = tmp_path / "root"
        self.aside = tmp_path / "aside"
        for folder in (self.root, self.aside):
            folder.mkdir(exist_ok=True)
        self.sources = LocalSources((self.root,))
        self.names = Names(self.sources)
        self.watcher = Watcher(
            self.names, self.sources, seen=seen or {}, reserved=reserved, gone_seconds=0
        )

    def put(self, name: str, raw=ONE) -> None:
        """A whole folder, renamed into place."""
        if (self.root / name).exists():
            (self.root / name).rename(self.aside / f"old-{len(os.listdir(self.aside))}")
        write_files(self.aside / name, raw)
        (self.aside / name).rename(self.root / name)


@pytest.fixture
async def place(tmp_path):
    return Place(tmp_path)


async def test_a_new_folder_loads_a_changed_one_swaps_a_removed_one_unloads(place):
    await place.watcher.look()
    assert place.names.versions == {}
    place.put("tone")
    await place.watcher.look()
    assert place.names.versions == {"tone": V1}
    place.put("tone", TWO)
    await place.watcher.look()
    assert place.names.versions == {"tone": V2}
    shutil.rmtree(place.root / "tone")
    await place.watcher.look()
    assert place.names.versions == {}


async def test_an_unchanged_folder_is_not_read_again(place):
    place.put("tone")
    for _ in range(3):
        await place.watcher.look()
    assert place.names.tried == 1


async def test_files_replaced_by_rename_inside_the_folder_swap(place):
    place.put("tone")
    await place.watcher.look()
    (place.root / "tone" / "new").write_bytes(TWO.weights)
    (place.root / "tone" / "new").replace(place.root / "tone" / WEIGHTS_FILE)
    await place.watcher.look()
    assert place.names.versions == {"tone": V2}


async def test_a_half_written_folder_does_nothing_until_it_is_whole(place):
    tone = place.root / "tone"
    tone.mkdir()
    await place.watcher.look()
    (tone / CONFIG_FILE).write_bytes(ONE.config)
    await place.watcher.look()
    assert place.names.tried == 0
    for size in (0, 5, 100, len(ONE.weights) - 1):
        (tone / WEIGHTS_FILE).write_bytes(ONE.weights[:size])
        await place.watcher.look()
        assert place.names.versions == {}
    (tone / WEIGHTS_FILE).write_bytes(ONE.weights)
    await place.watcher.look()
    assert place.names.versions == {"tone": V1}


async def test_a_half_written_change_leaves_the_old_version_and_is_told_once(place, caplog):
    place.put("tone")
    await place.watcher.look()
    (place.root / "tone" / WEIGHTS_FILE).write_bytes(TWO.weights[:-1])
    for _ in range(3):
        await place.watcher.look()
    assert place.names.versions == {"tone": V1}
    assert caplog.text.count("adapter not loaded from its folder") == 1
    assert place.names.tried == 2
    (place.root / "tone" / CONFIG_FILE).unlink()  # on its way to another one
    await place.watcher.look()
    assert place.names.versions == {"tone": V1}
    (place.root / "tone" / CONFIG_FILE).write_bytes(ONE.config)
    (place.root / "tone" / WEIGHTS_FILE).write_bytes(TWO.weights)
    await place.watcher.look()
    assert place.names.versions == {"tone": V2}


async def test_a_folder_that_is_back_at_the_second_look_was_never_gone(place, monkeypatch):
    place.put("tone")
    await place.watcher.look()
    (place.root / "tone").rename(place.aside / "tone")

    async def back(seconds: float) -> None:
        (place.aside / "tone").rename(place.root / "tone")

    unloads = []
    monkeypatch.setattr(place.names, "unload", unloads.append)
    with monkeypatch.context() as patch:
        patch.setattr("fader_server.watch.asyncio.sleep", back)
        await place.watcher.look()
    assert unloads == []
    (place.root / "tone").rename(place.aside / "gone")
    await place.watcher.look()
    assert unloads == ["tone"]


async def test_a_root_that_cannot_be_listed_unloads_nothing(place, caplog):
    place.put("tone")
    await place.watcher.look()
    place.root.rename(place.aside / "root")
    await place.watcher.look()
    assert place.names.versions == {"tone": V1}
    assert "cannot be listed" in caplog.text


async def test_a_root_that_cannot_be_opened_for_now_unloads_nothing(place, monkeypatch):
    place.put("tone")
    await place.watcher.look()
    shutil.rmtree(place.root / "tone")

    def fail(reference: str) -> bool:
        raise SourceUnavailable("EMFILE")

    with monkeypatch.context() as patch:
        patch.setattr(place.sources, "holds", fail)
        await place.watcher.look()
    assert place.names.versions == {"tone": V1}
    await place.watcher.look()
    assert place.names.versions == {}


async def test_a_moved_folder_moves_its_name(place):
    place.put("a")
    await place.watcher.look()
    (place.root / "a").rename(place.root / "b")
    await place.watcher.look()
    assert place.names.versions == {"b": V1}


async def test_names_from_elsewhere_are_left_alone(tmp_path):
    place = Place(tmp_path, reserved=("base", "flag"))
    place.names.put("theirs", "0" * 64, "/somewhere/else")
    for name in ("theirs", "base", "flag"):
        place.put(name)
    await place.watcher.look()
    assert place.names.versions == {"theirs": "0" * 64}
    for name in ("theirs", "base", "flag"):
        shutil.rmtree(place.root / name)
    await place.watcher.look()
    assert place.names.versions == {"theirs": "0" * 64}


async def test_what_an_administrator_moved_or_unloaded_is_theirs_until_the_folder_goes(place):
    place.put("moved")
    place.put("unloaded")
    await place.watcher.look()
    place.names.put("moved", "0" * 64, "other")
    place.names.unload("unloaded")
    for name in ("moved", "unloaded"):
        place.put(name, TWO)
    await place.watcher.look()
    assert place.names.versions == {"moved": "0" * 64}
    for name in ("moved", "unloaded"):
        shutil.rmtree(place.root / name)
    await place.watcher.look()
    assert place.names.versions == {"moved": "0" * 64}
    place.put("unloaded")
    await place.watcher.look()
    assert place.names.versions == {"moved": "0" * 64, "unloaded": V1}


async def test_a_pin_outlives_a_swap(place):
    place.put("tone")
    await place.watcher.look()
    place.names.infos["tone"] = replace(place.names.infos["tone"], pinned=True)
    place.put("tone", TWO)
    await place.watcher.look()
    assert place.names.infos["tone"].version == V2
    assert place.names.infos["tone"].pinned


async def test_what_does_not_fit_is_tried_again(place):
    place.put("tone")
    place.names.full = True
    await place.watcher.look()
    assert place.names.versions == {}
    place.names.full = False
    await place.watcher.look()
    assert place.names.versions == {"tone": V1}


async def test_a_folder_whose_disk_failed_is_tried_again_without_a_change(place, caplog):
    place.put("tone")
    place.names.failures["tone"] = SourceUnavailable("cannot be read (EIO)")
    await place.watcher.look()
    assert place.names.versions == {}
    assert "adapter not loaded yet" in caplog.text
    place.names.failures.clear()
    await place.watcher.look()
    assert place.names.versions == {"tone": V1}


@pytest.mark.parametrize("fault", [OSError(5, "EIO"), MemoryError(), TypeError("a bug")])
async def test_no_fault_of_one_folder_ends_the_watching_of_the_others(place, caplog, fault):
    for name in ("first", "second"):
        place.put(name)
    place.names.failures["first"] = fault
    task = asyncio.create_task(place.watcher.run(changes_in([place.root])))
    try:
        await until(place, {"second": V1})
        place.names.failures.clear()
        place.put("first", TWO)
        await until(place, {"first": V2, "second": V1})
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert caplog.text.count("a folder could not be followed") == 1


async def test_a_folder_with_the_name_of_a_recipe_loads_when_the_recipe_has_gone(place):
    place.put("warm")
    place.names.reserved.add("warm")
    await place.watcher.look()
    assert place.names.versions == {}
    place.names.reserved.clear()
    await place.watcher.look()
    assert place.names.versions == {"warm": V1}


async def test_what_was_loaded_at_the_start_is_followed(tmp_path):
    first = Place(tmp_path)
    first.put("tone")
    first.put("broken", replace(ONE, weights=b"x"))
    seen = {
        found.name: Seen(found.stamp, V1 if found.name == "tone" else "")
        for found in first.sources.discover()
    }
    place = Place(tmp_path, seen=seen)
    place.names.put("tone", V1, "tone")
    await place.watcher.look()
    assert place.names.tried == 0
    place.put("broken", TWO)
    shutil.rmtree(place.root / "tone")
    await place.watcher.look()
    assert place.names.versions == {"broken": V2}


async def test_symlinks_and_files_in_a_root_are_nothing(place):
    write_files(place.aside / "outside")
    (place.root / "link").symlink_to(place.aside / "outside")
    (place.root / "file").write_bytes(b"x")
    os.mkfifo(place.root / "fifo")
    (place.root / "tone").mkdir()
    os.mkfifo(place.root / "tone" / CONFIG_FILE)
    await place.watcher.look()
    assert place.names.tried == 0


async def until(place: Place, wanted: dict[str, str]) -> None:
    async with asyncio.timeout(20):
        while place.names.versions != wanted:
            place.names.changed.clear()
            await place.names.changed.wait()


async def test_the_systems_own_notices_drive_it(place):
    task = asyncio.create_task(place.watcher.run(changes_in([place.root])))
    try:
        place.put("tone")
        await until(place, {"tone": V1})
        place.put("tone", TWO)
        await until(place, {"tone": V2})
        shutil.rmtree(place.root / "tone")
        await until(place, {})
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_system_that_gives_no_notices_is_told_and_looked_at_anyway(
    place, monkeypatch, caplog
):
    monkeypatch.setattr("fader_server.watch.BLIND_SECONDS", 0)

    async def refuse() -> AsyncIterator[object]:
        raise OSError(28, "inotify watch limit reached")
        yield

    task = asyncio.create_task(place.watcher.run(refuse))
    try:
        place.put("tone")
        await until(place, {"tone": V1})
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert "cannot be watched" in caplog.text
