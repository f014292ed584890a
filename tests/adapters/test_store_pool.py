"""Store and pool together, driven at random as requests and administrators would.

The engine is played by a queue of messages that are handled in order, late.
"""

import math
from collections import deque
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fader_adapters.claims import Claims
from fader_adapters.errors import AdapterError, AdapterNotFound, AdapterTooLarge, ArenaFull
from fader_adapters.kernels.tables import Tables
from fader_adapters.leases import AdapterRef, Lease, Reservation
from fader_adapters.pool import Pool
from fader_adapters.spec import Digest
from fader_adapters.store import Store
from fader_adapters.tiers import ArenaTier
from tests.adapters.peft_files import make_parsed

PARSED = [make_parsed(seed=seed, rank=rank) for seed, rank in enumerate((2, 2, 4, 4, 6))]
NUMEL = PARSED[2].spec.numel
WEIGHTS = {}
for _parsed in PARSED:
    WEIGHTS[_parsed.spec.version] = torch.empty(_parsed.spec.numel)
    _parsed.write(WEIGHTS[_parsed.spec.version])
NAMES = ("a", "b", "c")


class StoreAndPool(RuleBasedStateMachine):
    in_place: bool

    def __init__(self):
        super().__init__()
        self.arena = torch.full((3 * NUMEL,), math.nan)
        linears = 10
        self.tables = Tables(self.arena, linears)
        self.pool = Pool(self.tables, in_place=self.in_place)
        tier = ArenaTier(self.arena if self.in_place else torch.empty(4 * NUMEL))
        self.store = Store(tier, on_retired=self.on_retired)
        self.engine: deque[Callable[[], None]] = deque()
        self.current: dict[str, Digest] = {}
        self.leases: list[tuple[Lease, set[Digest]]] = []
        self.pinned: list[tuple[Lease, tuple[Digest, ...]]] = []
        self.reservations: list[Reservation] = []
        self.claimed: set[tuple[str, Digest]] = set()
        self.kept: set[tuple[str, Digest]] = set()
        """Of the claimed, those that must be there."""

    def on_retired(self, version):
        def forget():
            self.pool.forget(version)
            self.store.reclaim(version)

        self.engine.append(forget)

    @rule(parsed=st.sampled_from(PARSED))
    def reserve(self, parsed):
        try:
            reservation = self.store.reserve(parsed)
        except ArenaFull:
            return
        reservation.fill()
        self.reservations.append(reservation)

    @precondition(lambda self: self.reservations)
    @rule(name=st.sampled_from(NAMES), replace=st.booleans(), data=st.data())
    def publish(self, name, replace, data):
        index = data.draw(st.integers(0, len(self.reservations) - 1))
        reservation = self.reservations.pop(index)
        with reservation:
            try:
                adapter = self.store.publish(name, reservation, replace=replace)
            except AdapterError:
                assert name in self.current
                assert not replace
                return
        self.current[name] = adapter.version
        self.kept |= {(name, adapter.version)} & self.claimed

    @rule(pairs=st.sets(st.tuples(st.sampled_from(NAMES), st.integers(0, 4)), max_size=3))
    def claim(self, pairs):
        self.claimed = {(name, PARSED[index].spec.version) for name, index in pairs}
        self.store.claim(Claims(versions=frozenset(self.claimed)))
        self.kept = (self.kept | set(self.current.items())) & self.claimed

    @precondition(lambda self: self.reservations)
    @rule(name=st.sampled_from(NAMES))
    def adopt(self, name):
        with self.reservations.pop() as reservation:
            try:
                self.store.adopt(name, reservation)
            except AdapterNotFound:
                assert name not in self.current
                return
        self.kept |= {(name, reservation.version)} & self.claimed

    @precondition(lambda self: self.reservations)
    @rule()
    def cancel(self):
        self.reservations.pop().cancel()

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name):
        if name in self.current:
            self.store.unload(name)
            del self.current[name]
            self.kept = {pair for pair in self.kept if pair[0] != name}
        else:
            with pytest.raises(AdapterNotFound):
                self.store.unload(name)

    @rule(names=st.sets(st.sampled_from(NAMES), min_size=1))
    def lease(self, names):
        names = sorted(names)
        try:
            lease = self.store.acquire([AdapterRef(name) for name in names])
        except AdapterError:
            assert len({self.current.get(name, name) for name in names}) < len(names) or not all(
                name in self.current for name in names
            )
            return
        assert set(lease.adapters) == {self.current[name] for name in names}
        self.leases.append((lease, set(lease.adapters)))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def start(self, data):
        """A leased request reaches the engine, which pins what it needs or leaves it waiting."""
        lease, _ = data.draw(st.sampled_from(self.leases))
        self.handle_engine()
        try:
            uploads = self.pool.acquire(lease.adapters)
        except AdapterTooLarge:
            sizes = [adapter.spec.numel for adapter in lease.adapters.values()]
            assert sum(sizes) > self.arena.numel()
            return
        if uploads is None:
            assert not self.in_place
            return
        self.pool.upload(uploads)
        self.pinned.append((lease, tuple(lease.adapters)))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), late=st.booleans())
    def end(self, data, late):
        """A request ends: its pins first (perhaps as an abort in the queue), then its lease."""
        index = data.draw(st.integers(0, len(self.leases) - 1))
        lease, _ = self.leases.pop(index)
        mine = [pin for pin in self.pinned if pin[0] is lease]
        self.pinned = [pin for pin in self.pinned if pin[0] is not lease]
        for _, versions in mine:
            if late:
                self.engine.append(lambda versions=versions: self.pool.release(versions))
            else:
                self.pool.release(versions)
        lease.release()
        lease.release()

    @precondition(lambda self: self.engine)
    @rule()
    def handle_one(self):
        self.engine.popleft()()

    def handle_engine(self):
        while self.engine:
            self.engine.popleft()()

    @invariant()
    def leases_are_counted(self):
        assert self.store.leases == len(self.leases)

    @invariant()
    def leased_weights_are_intact_on_the_host(self):
        for lease, versions in self.leases:
            assert set(lease.adapters) == versions
            for version, adapter in lease.adapters.items():
                assert torch.equal(adapter.flat, WEIGHTS[version])

    @invariant()
    def names_and_versions_agree_on_the_past(self):
        names, versions = self.store._names, self.store._versions
        by_name = {(name, v) for name, record in names.items() for v in record.former}
        assert by_name == {(name, v) for v, entry in versions.items() for name in entry.former}
        for version, entry in versions.items():
            assert entry.kept <= entry.names | entry.former
            assert all(names[name].version == version for name in entry.names)

    @invariant()
    def claimed_weights_are_intact_on_the_host(self):
        for name, version in self.kept:
            with self.store.acquire([AdapterRef(name, version)]) as lease:
                assert torch.equal(lease.adapters[version].flat, WEIGHTS[version])

    @invariant()
    def pinned_weights_are_intact_on_the_device(self):
        slots: dict[int, Digest] = {}
        for lease, versions in self.pinned:
            for version in versions:
                slot = self.pool.slot(version)
                assert slots.setdefault(slot, version) == version
                for delta in lease.adapters[version].spec.deltas:
                    start = int(self.tables.a_offset[slot, delta.linear]) - delta.a_offset
                    numel = lease.adapters[version].spec.numel
                    assert start == int(self.tables.b_offset[slot, delta.linear]) - delta.b_offset
                    assert torch.equal(self.arena[start : start + numel], WEIGHTS[version])

    @invariant()
    def names_mean_what_was_published(self):
        assert {s.name: s.version for s in self.store.list()} == self.current

    def teardown(self):
        for reservation in self.reservations:
            reservation.cancel()
        for _, versions in self.pinned:
            self.pool.release(versions)
        for lease, _ in self.leases:
            lease.release()
        for name in self.current:
            self.store.unload(name)
        self.handle_engine()
        assert self.store.leases == self.store.versions == self.store.used_bytes == 0
        assert self.pool.resident == self.pool.pins == self.pool.resident_bytes == 0
        assert not self.tables.rank.any()


class OnCpu(StoreAndPool):
    in_place = True


class BesideGpu(StoreAndPool):
    in_place = False


TestOnCpu = OnCpu.TestCase
TestBesideGpu = BesideGpu.TestCase
TestOnCpu.settings = TestBesideGpu.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)


def test_freeing_an_extent_before_the_engine_forgot_it_would_be_seen(monkeypatch):
    """The control: without the handshake a pinned version is overwritten, and that is noticed."""

    def retire_at_once(self, version):
        self.store.reclaim(version)

    monkeypatch.setattr(OnCpu, "on_retired", retire_at_once)
    machine = OnCpu()
    machine.reserve(PARSED[4])
    machine.reservations[0].fill()
    with machine.reservations.pop() as reservation:
        machine.current["a"] = machine.store.publish("a", reservation).version
    lease = machine.store.acquire([AdapterRef("a")])
    machine.pool.upload(machine.pool.acquire(lease.adapters) or ())
    machine.pinned.append((lease, tuple(lease.adapters)))
    machine.store.unload("a")
    machine.current.clear()
    lease.release()  # the engine still works on it
    machine.pinned_weights_are_intact_on_the_device()
    machine.reserve(PARSED[3])
    with pytest.raises(AssertionError):
        machine.pinned_weights_are_intact_on_the_device()
