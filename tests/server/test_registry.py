"""Loads by name: what is refused by name or version costs no look at the source."""

import asyncio
import threading

import pytest

from fader_adapters.errors import AdapterError, AdapterExists, SourceNotFound, VersionConflict
from fader_adapters.source import RawAdapter
from fader_server.api.adapter_ports import LoadOrder
from fader_server.api.blends import AdapterRef
from tests.server.engine.engine_world import version
from tests.server.room_world import Folders, Served


class Counting(Folders):
    """What was read; `gone-1` is not there, `slow-1` comes when it may."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.go = threading.Event()

    def fetch_local(self, reference: str, revision: str | None) -> RawAdapter:
        self.read.append(reference)
        if reference == "gone-1":
            raise SourceNotFound("nothing there")
        if reference == "slow-1":
            assert self.go.wait(10)
        return super().fetch_local(reference, revision)

    def fetch(self, reference: str, revision: str | None) -> RawAdapter:
        return super().fetch_local(reference, revision)


def served() -> tuple[Served, Counting]:
    world, folders = Served(10), Counting()
    world.registry._reader._sources = folders  # pyright: ignore[reportAttributeAccessIssue]
    return world, folders


ONE, OTHER = version("one-1"), version("other-1")


@pytest.mark.parametrize(
    ("wishes", "error"),
    [
        ({"replace": False}, AdapterExists),
        ({"if_version": ""}, VersionConflict),
        ({"if_version": OTHER}, VersionConflict),
        ({"if_version": OTHER[:12], "replace": False}, VersionConflict),
    ],
)
@pytest.mark.parametrize("parked", [False, True])
async def test_a_load_that_its_name_refuses_reads_nothing(wishes, error, parked):
    world, folders = served()
    await world.adapters.load(LoadOrder("a", "one-1"))
    if parked:
        assert world.adapters._make_room()
        assert world.tier("a") == "disk"
    for source in ("gone-1", "one-1"):
        with pytest.raises(error):
            await world.adapters.load(LoadOrder("a", source, **wishes))
    assert folders.read == ["one-1"]
    with pytest.raises(SourceNotFound):
        await world.adapters.load(LoadOrder("a", "gone-1", if_version=ONE[:12]))


@pytest.mark.parametrize(
    ("wishes", "error"),
    [({"replace": False}, AdapterExists), ({"if_version": ""}, VersionConflict)],
)
async def test_a_name_that_was_taken_meanwhile_is_refused_at_publication(wishes, error):
    """Not by what was compared before."""
    world, folders = served()
    load = asyncio.create_task(world.registry.load(LoadOrder("a", "slow-1", **wishes)))
    while "slow-1" not in folders.read:  # noqa: ASYNC110 - told on a thread
        await asyncio.sleep(0.001)
    world.registry.load_now(LoadOrder("a", "one-1"))
    folders.go.set()
    with pytest.raises(AdapterError) as refused:
        await load
    assert type(refused.value) is error
    assert world.registry.get(AdapterRef("a")).version == ONE
