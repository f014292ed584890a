"""The device tier: pins hold, the least recently used leaves, a refused acquire changes nothing."""

import math
from dataclasses import dataclass

import pytest
import torch

from fader_adapters.errors import AdapterTooLarge
from fader_adapters.kernels.tables import Tables
from fader_adapters.pool import Pool
from fader_adapters.spec import AdapterSpec, Digest, RankScale, lay_out
from fader_adapters.tiers import ArenaTier
from tests.adapters.peft_files import BASE

UNIT = lay_out(BASE, Digest("0" * 64), [RankScale(0, 1, 1.0)]).numel


@dataclass(frozen=True)
class Data:
    spec: AdapterSpec
    flat: torch.Tensor


def make(number: int, rank: int = 1, flat: torch.Tensor | None = None) -> Data:
    """A version that needs `rank` units of the arena and holds its number everywhere."""
    spec = lay_out(BASE, Digest(f"{number:064x}"), [RankScale(0, rank, 0.5 * number)])
    return Data(spec, torch.full((spec.numel,), float(number)) if flat is None else flat)


class World:
    """A pool over an arena of `room` units."""

    def __init__(self, room: int):
        self.tables = Tables(torch.full((room * UNIT,), math.nan), len(BASE.linears))
        self.pool = Pool(self.tables)

    def take(self, *data: Data):
        """Acquire and upload, as one step does."""
        uploads = self.pool.acquire({d.spec.version: d for d in data})
        if uploads is not None:
            self.pool.upload(uploads)
        return uploads

    def let_go(self, *data: Data):
        self.pool.release(tuple(d.spec.version for d in data))

    def snapshot(self):
        pool, tables = self.pool, self.tables
        return (
            list(pool._residents), pool._extents.holes, list(pool._free_slots), pool.evictions,
            tables.generation, tables.rank.tolist(), tables.a_offset.tolist(), pool.pins,
        )  # fmt: skip

    def check(self, data: Data):
        """The arena holds this version where its slot says."""
        slot = self.pool.slot(data.spec.version)
        (delta,) = data.spec.deltas
        offset = int(self.tables.a_offset[slot, 0])
        assert offset >= 0
        rows = self.tables.arena[offset : offset + delta.rank * BASE.linears[0].in_features]
        assert torch.equal(rows, data.flat[: len(rows)])
        assert self.tables.rank[slot, 0] == delta.rank
        assert self.tables.scale[slot, 0] == delta.scale


A, B, C, D = (make(n) for n in range(1, 5))


def test_acquired_versions_are_uploaded_once():
    world = World(3)
    uploads = world.take(A, B)
    assert [u.data for u in uploads] == [A, B]
    world.check(A)
    world.check(B)
    assert world.take(A) == ()
    assert world.pool.uploads == 2
    assert world.pool.resident_bytes == 2 * UNIT * 4


def test_a_version_planned_in_the_same_step_is_not_uploaded_twice():
    world = World(3)
    first = world.pool.acquire({A.spec.version: A})
    second = world.pool.acquire({A.spec.version: A, B.spec.version: B})
    assert first is not None
    assert second is not None
    assert [u.data for u in (*first, *second)] == [A, B]
    world.pool.upload((*first, *second))
    world.pool.upload(first)
    assert world.pool.uploads == 2
    world.check(A)


def test_the_least_recently_used_unpinned_version_is_evicted():
    world = World(3)
    world.take(A)
    world.take(B, C)
    world.let_go(B, C)
    world.let_go(A)
    world.take(A)
    world.let_go(A)
    assert world.take(D)
    assert B.spec.version not in world.pool
    assert all(x.spec.version in world.pool for x in (A, C, D))
    assert world.pool.evictions == 1
    for data in (A, C, D):
        world.check(data)


def test_pinned_versions_are_never_evicted():
    world = World(2)
    world.take(A, B)
    before = world.snapshot()
    assert world.take(C) is None
    assert world.snapshot() == before
    world.let_go(A)
    assert world.take(C)
    world.check(B)
    world.check(C)


def test_a_version_asked_for_is_not_evicted_for_its_neighbour():
    world = World(2)
    world.take(A)
    world.let_go(A)
    world.take(B)
    world.let_go(B)
    world.take(A, C)
    world.check(A)
    world.check(C)
    assert B.spec.version not in world.pool


def test_what_can_never_fit_is_refused_and_changes_nothing():
    world = World(2)
    world.take(A)
    before = world.snapshot()
    for too_large in ([make(9, 3)], [A, B, C]):
        with pytest.raises(AdapterTooLarge, match="bytes"):
            world.take(*too_large)
        assert world.snapshot() == before
    world.let_go(A)
    assert world.take(make(9, 2))


def test_a_refused_acquire_changes_nothing_even_when_some_could_be_evicted():
    world = World(4)
    world.take(A, B, C, D)
    world.let_go(A, C)
    before = world.snapshot()
    assert world.take(make(9, 2)) is None  # two units are free, but not beside each other
    assert world.snapshot() == before
    world.let_go(B)
    assert world.take(make(9, 2))
    world.check(D)


def test_slots_are_reused_and_emptied_first():
    world = World(1)
    slots = []
    for data in (A, B, C):
        world.take(data)
        slots.append(world.pool.slot(data.spec.version))
        world.let_go(data)
    assert slots == [0, 0, 0]
    world.pool.forget(C.spec.version)
    assert not world.tables.rank.any()
    assert (world.tables.a_offset == -1).all()


def test_forgetting_drops_now_or_with_the_last_pin():
    world = World(3)
    world.take(A)
    world.take(A)
    world.take(B)
    world.let_go(B)
    world.pool.forget(B.spec.version)
    assert B.spec.version not in world.pool
    world.pool.forget(A.spec.version)
    world.let_go(A)
    world.check(A)
    world.let_go(A)
    assert A.spec.version not in world.pool
    assert world.pool.resident_bytes == 0
    world.pool.forget(C.spec.version)
    with pytest.raises(LookupError):
        world.pool.slot(A.spec.version)


def test_a_version_whose_plan_was_dropped_is_uploaded_by_the_next_one():
    world = World(2)
    assert world.pool.acquire({A.spec.version: A})
    world.let_go(A)  # never uploaded
    assert A.spec.version not in world.pool
    assert world.take(A)
    world.check(A)


def test_a_failed_upload_leaves_the_version_to_be_uploaded_again(monkeypatch):
    world = World(2)
    uploads = world.pool.acquire({A.spec.version: A})
    assert uploads is not None
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", _fail)
        with pytest.raises(MemoryError):
            world.pool.upload(uploads)
    world.pool.upload(uploads)
    world.check(A)


def _fail(*args, **kwargs):
    raise MemoryError


def test_releasing_what_is_not_pinned_is_a_fault():
    world = World(2)
    world.take(A)
    world.let_go(A)
    with pytest.raises(AssertionError):
        world.let_go(A)


def test_adapters_inside_the_arena_are_published_without_a_copy():
    outer = torch.full((5 * UNIT,), math.nan)
    arena = outer[UNIT:]  # the arena need not start its storage
    tier, tables = ArenaTier(arena), Tables(arena, len(BASE.linears))
    pool = Pool(tables, in_place=True)
    adapters = []
    for number in (1, 2, 3):
        flat = tier.allocate(UNIT)
        assert flat is not None
        adapters.append(make(number, flat=flat.fill_(number)))
    before = arena.clone()
    pool.upload(pool.acquire({d.spec.version: d for d in adapters}) or ())
    torch.testing.assert_close(arena, before, rtol=0, atol=0, equal_nan=True)
    for number, data in enumerate(adapters):
        offset = int(tables.a_offset[pool.slot(data.spec.version), 0])
        assert offset == number * UNIT
        assert arena[offset] == number + 1
    pool.release(tuple(d.spec.version for d in adapters))
    assert pool.resident == 3
    pool.forget(adapters[0].spec.version)
    assert pool.resident == 2
    with pytest.raises(AssertionError):  # a stranger's memory is never published
        pool.acquire({D.spec.version: D})


def test_what_can_never_fit_is_told_with_bytes_before_anything_is_tried():
    world = World(3)
    wide = make(9, rank=4)
    with pytest.raises(AdapterTooLarge, match=f"need {4 * UNIT * 4} bytes, the arena has"):
        world.pool.check({wide.spec.version: wide})
    world.take(A, B, C)
    world.pool.check({d.spec.version: d for d in (A, B, D)})  # full now is not never


def test_it_tells_who_would_cost_another_its_place():
    world = World(2)

    def displaces(*data: Data) -> bool:
        return world.pool.displaces({d.spec.version: d for d in data})

    assert not displaces()
    assert not displaces(A, B)
    world.take(A)
    assert not displaces(A)
    assert not displaces(B)
    assert displaces(B, C)
    world.take(B)
    world.let_go(A, B)
    assert displaces(C)
    assert not displaces(A, B)


def ahead(world: World, *line: Data) -> list[Digest]:
    """Prefetch for a line of requests with one adapter each, as one step does; what came in."""
    uploads = world.pool.prefetch([{d.spec.version: d} for d in line])
    world.pool.upload(uploads)
    return [upload.data.spec.version for upload in uploads]


def test_adapters_of_waiting_requests_come_in_one_by_one_in_their_order():
    world = World(3)
    world.take(A)
    assert ahead(world, B, C, D) == [B.spec.version]
    assert ahead(world, B, C, D) == [C.spec.version]
    assert ahead(world, B, C, D) == [], "the one that runs and those before D keep their places"
    assert world.pool.pins == 1
    world.check(B)
    assert world.take(B) == (), "nothing left to copy"
    world.let_go(A)
    assert ahead(world, B, C, D) == [D.spec.version]
    assert A.spec.version not in world.pool


def test_what_is_waited_for_leaves_last_and_what_comes_first_last_of_all():
    world = World(3)
    world.take(A, B, C)
    world.let_go(A, B, C)
    assert ahead(world, A, B) == []
    world.take(D)
    assert C.spec.version not in world.pool
    world.take(make(8))
    assert A.spec.version in world.pool
    assert B.spec.version not in world.pool


def test_what_a_dropped_plan_was_to_bring_in_comes_with_who_needs_it():
    world = World(3)
    (dropped,) = world.pool.prefetch([{A.spec.version: A}])
    (again,) = world.pool.acquire({A.spec.version: A}) or ()
    assert again == dropped
    assert world.pool.acquire({A.spec.version: A}) == (), "that plan has it"
    world.pool.upload([again])
    world.check(A)
    world.let_go(A)
    world.let_go(A)
    assert world.take(A) == ()


def test_a_prefetch_that_never_fits_costs_nothing():
    world = World(2)
    world.take(A)
    before = world.snapshot()
    assert ahead(world, make(9, rank=3)) == []
    assert world.snapshot() == before
    assert ahead(world) == []


def test_an_own_version_that_lies_in_the_way_is_moved():
    wide = make(9, rank=2)
    middle = World(3)
    middle.take(D, B, C)
    middle.let_go(D, B, C)
    middle.pool.forget(B.spec.version)
    middle.pool.forget(D.spec.version)  # 1 free, C, 1 free
    uploads = middle.take(wide, C)
    assert uploads is not None, "or it would wait for ever: nothing else is there to leave"
    assert {u.data.spec.version for u in uploads} == {wide.spec.version, C.spec.version}
    middle.check(wide)
    middle.check(C)
    assert middle.pool.pins == 2
    pinned = World(3)
    pinned.take(D, B, C)
    pinned.let_go(D, B)
    before = pinned.snapshot()
    assert pinned.take(wide, C) is None, "a running request holds it where it is"
    assert pinned.snapshot() == before
