"""Seeded lives of a whole server's adapters, and bugs planted to prove that they are watched."""

import logging
from collections import Counter

import pytest

from fader_adapters import records
from fader_adapters.leases import Reservation
from fader_adapters.pool import Pool
from fader_adapters.spec import RowTerms
from fader_adapters.store import Store
from fader_server import registry as registry_module
from fader_server.engine import blocks as blocks_module
from fader_server.engine.loop import Engine
from fader_server.engine.roster import Roster
from fader_server.engine.scheduler import Scheduler
from fader_server.registry import Registry
from tests.server.engine.live_world import live


@pytest.fixture(autouse=True)
def played(monkeypatch):
    """Nobody waits for wall clock, nobody writes tracebacks of injected faults."""
    monkeypatch.setattr(registry_module, "_LEAVING_SECONDS", 0.0)
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def test_no_life_breaks_a_promise():
    worlds = [live(seed) for seed in range(300)]
    seen = [call.seen for world in worlds for call in world.calls.values()]
    ends = Counter(s.finish or type(s.error).__name__ for s in seen if not s.aborted)
    assert {"stop", "length", "EngineFault", "NumericFault"} == set(ends)
    refused = sum((world.refused for world in worlds), Counter())
    kinds = ("AdapterNotFound", "AdapterExists", "AdapterTooLarge", "ArenaFull", "MemoryError")
    for kind in (*kinds, "VersionConflict", "SourceNotFound", "SourceUnavailable", "BlendInvalid"):
        assert refused[kind] > 3, kind
    assert sum(s.aborted for s in seen) > 20
    assert sum(s.cached > 0 for s in seen) > 20
    assert sum(world.crashed for world in worlds) > 5
    assert sum(world.scheduler.preemptions for world in worlds) > 20
    assert sum(world.pool.evictions for world in worlds) > 20


@pytest.mark.slow
def test_no_life_of_ten_thousand_breaks_a_promise():
    for seed in range(1_000, 11_000):
        live(seed)


def test_a_life_is_replayed_by_its_seed():
    one, two = ([(n, c.seen.tokens) for n, c in live(7).calls.items()] for _ in range(2))
    assert one == two


def slot_reused_early(monkeypatch):
    """The first request to end takes the slot along, whoever else is using it."""

    def release(self, versions):
        for version in versions:
            resident = self._residents.get(version)
            if resident is not None:
                resident.pins = 0
                self._drop(version)

    monkeypatch.setattr(Pool, "release", release)


def pins_forgotten(monkeypatch):
    """What a running request uses may be evicted."""
    acquire = Pool.acquire

    def unpinned(self, data):
        uploads = acquire(self, data)
        for version in data if uploads is not None else ():
            self._residents[version].pins = 0
        return uploads

    monkeypatch.setattr(Pool, "acquire", unpinned)
    monkeypatch.setattr(Pool, "release", lambda self, versions: None)
    monkeypatch.setattr("tests.server.engine.live_world.check_blocks", lambda scheduler: None)


def lease_dropped_at_unload(monkeypatch):
    """Unloading ends the leases of running requests."""

    def unload(self, name, if_version=None):
        entry = self._versions[self._record(name).version]
        del self._names[name]
        entry.names.discard(name)
        entry.leases = 0
        self._retire_unwanted(entry)

    monkeypatch.setattr(Store, "unload", unload)


def lease_released_twice(monkeypatch):
    """A lease counts once too often at its end."""
    release = Store._release

    def twice(self, entries):
        release(self, entries)
        for entry in entries:
            entry.leases = max(0, entry.leases - 1)

    monkeypatch.setattr(Store, "_release", twice)


def kv_ignores_the_version(monkeypatch):
    """Blocks are found by prompt alone, as under a name that was reloaded."""
    seed = blocks_module.chain_seed
    monkeypatch.setattr(
        blocks_module, "chain_seed", lambda blend, salt, size: seed("00" * 32, salt, size)
    )


def upload_skipped(monkeypatch):
    """A version that came back to a slot is taken for copied."""
    upload = Pool.upload

    def skip(self, uploads):
        for one in uploads:
            if self.evictions:
                self._tables.publish(one.slot, one.data.spec, one.offset)
                self._residents[one.data.spec.version].uploaded = True
            else:
                upload(self, (one,))

    monkeypatch.setattr(Pool, "upload", skip)


def memory_freed_before_the_device_forgot(monkeypatch):
    """The host's bytes go before the engine has answered."""
    monkeypatch.setattr(Registry, "_retired", lambda self, version: self._reclaim(version))


def swapped_before_it_was_filled(monkeypatch):
    """The name moves first, the weights come never."""
    monkeypatch.setattr(Reservation, "fill", lambda self: setattr(self, "filled", True))


def failed_swap_takes_the_old_one_down(monkeypatch):
    """A refused load leaves the name without a version."""
    publish = Registry._publish

    def careless(self, raw, order, make_room=lambda: False):
        try:
            return publish(self, raw, order, make_room)
        except Exception:
            if order.name in self._facts:
                self.unload(order.name)
            raise

    monkeypatch.setattr(Registry, "_publish", careless)


def reservation_leaked(monkeypatch):
    """A load that fails keeps its memory."""
    monkeypatch.setattr(Reservation, "cancel", lambda self: None)


def swap_without_compare(monkeypatch):
    """`if_version` is not looked at."""
    monkeypatch.setattr(records, "check_version", lambda name, current, expected: None)


def pins_leaked_on_abort(monkeypatch):
    """Who hangs up while running keeps its adapters on the device."""
    abort = Scheduler.abort

    def leak(self, request_id):
        sequence = self._roster.open.get(request_id)
        if sequence is not None and sequence.blocks and sequence.request.adapters:
            self.pool.acquire(sequence.request.adapters)
        return abort(self, request_id)

    monkeypatch.setattr(Scheduler, "abort", leak)


def slots_remembered_from_before(monkeypatch):
    """A memo of where versions are skips the look at where they are now."""
    start = Roster.start

    def stale(self, sequence, hits, *, total, sought):
        start(self, sequence, hits, total=total, sought=sought)
        memo = self.__dict__.setdefault("memo", {})
        found = []
        for phase, terms in zip(sequence.request.phases, sequence.terms, strict=True):
            now = zip(phase.blend.terms, terms.terms, strict=True)
            slots = [(memo.setdefault(term.version, slot), gamma) for term, (slot, gamma) in now]
            found.append(RowTerms(1, tuple(slots)))
        sequence.terms = tuple(found)

    monkeypatch.setattr(Roster, "start", stale)
    monkeypatch.setattr(Roster, "in_place", lambda self, sequence: True)


def crash_that_tells_nobody(monkeypatch):
    """The engine ends and its callers wait for ever."""

    def close(self, end):
        self._closed = end

    monkeypatch.setattr(Engine, "_close", close)


PLANTED = [
    slot_reused_early,
    pins_forgotten,
    lease_dropped_at_unload,
    lease_released_twice,
    kv_ignores_the_version,
    upload_skipped,
    memory_freed_before_the_device_forgot,
    swapped_before_it_was_filled,
    failed_swap_takes_the_old_one_down,
    reservation_leaked,
    swap_without_compare,
    pins_leaked_on_abort,
    slots_remembered_from_before,
    crash_that_tells_nobody,
]


@pytest.mark.parametrize("plant", PLANTED)
def test_the_life_notices(plant, monkeypatch):
    plant(monkeypatch)
    for seed in range(600):
        try:
            live(seed)
        except Exception:  # noqa: BLE001 - a broken promise may show itself in any way
            return
    pytest.fail("the planted bug went unnoticed")
