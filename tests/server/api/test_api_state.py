"""What comes back after a restart: adapters, pins, recipes and the versions that recipes name."""

import asyncio
import threading

import pytest

from fader_adapters.errors import AdapterInvalid, AdapterNotFound, NameReserved
from fader_server.api.adapter_ports import Loaded, LoadOrder
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.errors import ConfigInvalid
from fader_server.metrics import Metrics
from fader_server.ondemand import OnDemand
from fader_server.parking import Parking
from fader_server.recipes import RecipeBook
from fader_server.state import RememberedAdapters, recipes_in
from fader_server.state_entries import Origin, State, Wanted, WantedRecipe
from fader_server.state_file import StateFile
from tests.server.api.api_fakes import FakeAdapters, digest

ONE = Wanted("one", None, digest("one"), True)
TONE = digest("tone")


def remembered(tmp_path) -> RememberedAdapters:
    file = StateFile(tmp_path)
    return RememberedAdapters(FakeAdapters(), file, file.read())


def opened(tmp_path) -> tuple[RememberedAdapters, RecipeBook]:
    """As `fader serve` does it: the book claims before anything is restored."""
    adapters = remembered(tmp_path)
    recipes = recipes_in(StateFile(tmp_path).read())
    save = adapters.remember_recipes
    return adapters, RecipeBook(adapters, base="base", most=9, recipes=recipes, save=save)


def terms(**weights: float) -> list[NamedTerm]:
    return [NamedTerm(AdapterRef(name), weight) for name, weight in weights.items()]


async def test_loads_pins_and_unloads_come_back_after_a_restart(tmp_path):
    before = remembered(tmp_path)
    await before.load(LoadOrder("a", "one", pin=True))
    await before.load(LoadOrder("b", "two"))
    await before.load(LoadOrder("c", "three"))
    before.unload("c")
    before.unload("tone")
    before.pin("b", pinned=True)
    before.pin("domain", pinned=True)
    before.close()
    after = remembered(tmp_path)
    await after.restore()
    kept = {info.name: (info.version, info.pinned) for info in after.list()}
    assert kept == {
        "a": (digest("one"), True),
        "b": (digest("two"), True),
        "domain": (digest("domain"), True),
    }
    after.pin("domain", pinned=False)
    after.close()
    last = remembered(tmp_path)
    await last.restore()
    assert not last.get(AdapterRef("domain")).pinned
    last.close()


async def test_a_pin_makes_what_came_on_demand_wanted(tmp_path):
    adapters = remembered(tmp_path)
    await adapters._inner.load(LoadOrder("guest", "one"))
    adapters.pin("guest", pinned=True)
    adapters.close()
    after = remembered(tmp_path)
    await after.restore()
    assert after.get(AdapterRef("guest")).pinned
    after.close()


async def test_names_that_come_and_go_do_not_grow_the_file(tmp_path):
    adapters = remembered(tmp_path)
    for n in range(50):
        await adapters.load(LoadOrder(f"run-{n}", "one"))
        adapters.unload(f"run-{n}")
    adapters.close()
    assert StateFile(tmp_path).read() == State()


class Published(FakeAdapters):
    """A load returns some time after its name is there."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.published = asyncio.Semaphore(0)

    async def load(self, order: LoadOrder, **room) -> Loaded:
        loaded = await super().load(order)
        self.published.release()
        await self.gate.wait()
        return loaded

    def names(self) -> frozenset[str]:
        return frozenset(self.infos)

    def evict(self, may_go) -> None:
        return None


async def test_what_was_unloaded_before_its_load_returned_does_not_come_back(tmp_path):
    inner = Published()
    parking = Parking(inner, fixed=frozenset(), limit=100)
    adapters = RememberedAdapters(
        OnDemand(parking, offers=lambda name: True), StateFile(tmp_path), State()
    )
    load = asyncio.create_task(adapters.load(LoadOrder("a", "one")))
    moved = asyncio.create_task(adapters.load(LoadOrder("b", "one")))
    await inner.published.acquire()
    await inner.published.acquire()
    adapters.unload("a")
    last = asyncio.create_task(adapters.load(LoadOrder("b", "two")))
    await inner.published.acquire()
    inner.gate.set()
    assert (await load).info.version == digest("one")
    await asyncio.gather(moved, last)
    assert StateFile(tmp_path).read().adapters == {"b": Wanted("two", None, digest("two"), False)}
    with pytest.raises(AdapterNotFound):  # nor does a request bring it back
        await adapters.lease(terms(a=1.0))
    adapters.close()


async def test_what_the_next_start_would_offer_again_stays_unloaded(tmp_path):
    adapters = remembered(tmp_path)
    await adapters.load(LoadOrder("new", "/roots/new"))  # the folder has the name: it is found
    await adapters.load(LoadOrder("tone", "one"))
    for name in ("new", "tone", "domain"):
        adapters.unload(name)
    adapters.close()
    assert StateFile(tmp_path).read().adapters == {"new": None, "tone": None, "domain": None}


async def test_a_refused_load_is_not_remembered(tmp_path):
    adapters = remembered(tmp_path)
    with pytest.raises(AdapterInvalid):
        await adapters.load(LoadOrder("a", "broken"))
    adapters.close()
    assert StateFile(tmp_path).read() == State()


async def test_what_cannot_be_restored_is_reported_and_kept(tmp_path, caplog):
    file = StateFile(tmp_path)
    gone = Wanted("missing", None, "0" * 64, False)
    file.write(State({"gone": gone, "a": ONE}, pins=frozenset({"nobody"})))
    adapters = remembered(tmp_path)
    await adapters.restore()
    assert [record.fields["adapter"] for record in caplog.records] == ["gone", "nobody"]
    assert "a" in {info.name for info in adapters.list()}
    adapters.pin("a", pinned=False)
    adapters.close()
    assert set(file.read().adapters) == {"a", "gone"}


async def test_an_unload_is_on_disk_once_it_is_saved(tmp_path):
    adapters = remembered(tmp_path)
    await adapters.saved()  # nothing to wait for
    adapters.unload("tone")
    await adapters.saved()
    assert StateFile(tmp_path).read().adapters == {"tone": None}
    adapters.close()


def _scraped(adapters: RememberedAdapters) -> str:
    metrics = Metrics()
    metrics.add_gauges(adapters.gauges)
    return metrics.render().decode()


async def test_a_load_serves_even_when_it_cannot_be_written(tmp_path, monkeypatch, caplog):
    adapters = remembered(tmp_path)
    monkeypatch.setattr(
        StateFile, "write", lambda self, entries: (_ for _ in ()).throw(OSError(5, "x"))
    )
    assert (await adapters.load(LoadOrder("a", "one"))).info.version == digest("one")
    assert "state cannot be written" in caplog.text
    assert "fader_state_unsaved 1.0" in _scraped(adapters)
    monkeypatch.undo()
    await adapters.load(LoadOrder("b", "two"))
    assert "fader_state_unsaved 0.0" in _scraped(adapters)
    assert set(StateFile(tmp_path).read().adapters) == {"a", "b"}
    adapters.close()


async def test_recipes_come_back_as_they_were_written(tmp_path):
    adapters, book = opened(tmp_path)
    warm = await book.put("warm", [NamedTerm(AdapterRef("tone", TONE[:12]), 0.1 + 0.2)])
    await book.put("cold", terms(tone=-1.0, domain=0.0))
    await book.put("gone", terms(tone=1.0))
    await book.delete("gone")
    state = StateFile(tmp_path).read()  # before the end: an answer means that it is on disk
    assert set(state.recipes) == {"warm", "cold"}
    assert state.versions == {f"tone@{TONE}": Origin("/roots/tone", None)}
    adapters.close()
    adapters, book = opened(tmp_path)
    await adapters.restore()
    assert [recipe.name for recipe in book.list()] == ["cold", "warm"]
    assert book.get("warm") == warm.recipe
    assert book.get("warm").digest == warm.recipe.digest
    with pytest.raises(NameReserved):
        await adapters.load(LoadOrder("warm", "one"))
    await book.delete("warm")
    assert StateFile(tmp_path).read().versions == {}
    adapters.close()


async def test_a_version_that_its_name_has_left_comes_back_for_its_recipe(tmp_path, caplog):
    adapters, book = opened(tmp_path)
    await adapters.load(LoadOrder("a", "one"))
    await book.put("warm", [NamedTerm(AdapterRef("a", digest("one")), 1.0)])
    await adapters.load(LoadOrder("a", "two"))
    adapters.close()
    adapters, book = opened(tmp_path)
    await adapters.restore()
    assert adapters.get(AdapterRef("a")).version == digest("two")
    lease = await adapters.lease(book.get("warm").terms)
    assert [term.version for term in lease.terms] == [digest("one")]
    lease.release()
    assert not caplog.records
    adapters.close()


@pytest.mark.parametrize("source", ["missing", "another", None])
async def test_a_version_that_cannot_be_had_is_reported_and_its_recipe_stays(
    tmp_path, caplog, source
):
    file, ref = StateFile(tmp_path), f"tone@{digest('lost')}"
    recipe = WantedRecipe(((ref, 1.0), ("domain", 0.5), ("absent", 1.0)), 1)
    versions = {} if source is None else {ref: Origin(source, None)}
    file.write(State(recipes={"warm": recipe}, versions=versions))
    adapters, book = opened(tmp_path)
    await adapters.restore()
    told = [(record.fields["recipe"], record.fields["adapter"]) for record in caplog.records]
    assert told == [("warm", ref), ("warm", "absent")]
    assert book.find("warm") is not None
    await book.put("other", terms(tone=1.0))
    adapters.close()
    state = file.read()
    assert state.recipes["warm"] == recipe
    assert state.versions == versions  # the next start tries again


async def test_a_recipe_of_the_state_with_the_name_of_the_base_stops_the_start(tmp_path):
    StateFile(tmp_path).write(State(recipes={"base": WantedRecipe((("tone", 1.0),), 1)}))
    with pytest.raises(ConfigInvalid, match="--served-model-name base"):
        opened(tmp_path)


@pytest.mark.parametrize(("before", "now", "told"), [("a", "b", 1), ("a", "a", 0), ("", "b", 0)])
async def test_a_list_that_was_made_beside_another_base_is_told(
    tmp_path, caplog, before, now, told
):
    StateFile(tmp_path).write(State({"x": ONE}, base=before))
    file = StateFile(tmp_path)
    adapters = RememberedAdapters(FakeAdapters(), file, file.read(), base=now)
    assert len([r for r in caplog.records if "another base" in r.message]) == told
    await adapters.load(LoadOrder("a", "one"))
    adapters.close()
    assert StateFile(tmp_path).read().base == now


async def test_changes_while_one_is_written_share_a_write_and_all_are_on_disk(
    tmp_path, monkeypatch
):
    adapters, wrote, go = remembered(tmp_path), [], threading.Event()
    write = StateFile.write

    def slow(self: StateFile, state: State) -> None:
        go.wait()
        wrote.append(len(state.adapters))
        write(self, state)

    monkeypatch.setattr(StateFile, "write", slow)
    names = [f"n{k}" for k in range(20)]
    loads = [asyncio.create_task(adapters.load(LoadOrder(name, "one"))) for name in names]
    for _ in range(100):  # turns of the loop: all have been noted
        await asyncio.sleep(0)
    assert not any(load.done() for load in loads)
    go.set()
    await asyncio.gather(*loads)
    assert set(StateFile(tmp_path).read().adapters) == set(names)
    assert len(wrote) <= 2
    adapters.close()
