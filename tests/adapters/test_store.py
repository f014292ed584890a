"""Names, versions and leases: a lease keeps what it leased, and everything ends at zero."""

import math

import pytest
import torch

from fader_adapters.errors import (
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    AdapterTooLarge,
    ArenaFull,
    BlendInvalid,
    VersionConflict,
)
from fader_adapters.leases import AdapterRef
from fader_adapters.spec import BASE, Blend, Term
from fader_adapters.tiers import ArenaTier
from tests.adapters.peft_files import make_parsed
from tests.adapters.store_world import NUMEL, P, World, expected


@pytest.fixture
def world():
    return World()


def test_a_published_adapter_lies_in_the_arena_and_can_be_leased(world):
    adapter = world.load("tone", P[0])
    assert torch.equal(adapter.flat, expected(P[0]))
    assert adapter.flat.untyped_storage().data_ptr() == world.arena.untyped_storage().data_ptr()
    with world.lease("tone", weight=0.5) as lease:
        assert lease.adapters == {adapter.version: adapter}
        assert lease.blend == Blend((Term(adapter.version, 0.5),))
        assert [(t.name, t.version, t.weight) for t in lease.terms] == [
            ("tone", adapter.version, 0.5)
        ]
        assert world.store.leases == 1
    assert world.store.leases == 0


def test_a_lease_without_terms_is_the_base(world):
    with world.store.acquire([]) as lease:
        assert lease.blend == BASE
        assert world.store.leases == 1
    assert world.store.leases == 0


def test_terms_of_weight_zero_are_dropped_but_their_names_are_checked(world):
    world.load("tone", P[0])
    refs = [AdapterRef("tone", None, 0.0)]
    with world.store.acquire(refs) as lease:
        assert lease.blend == BASE
        assert lease.adapters == {}
        assert lease.terms == ()
        assert world.store.status("tone").leases == 0
    with pytest.raises(AdapterNotFound):
        world.store.acquire([AdapterRef("absent", None, 0.0)])


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 16.1, -17.0])
def test_weights_out_of_range_are_refused(world, weight):
    world.load("tone", P[0])
    assert world.lease("tone", weight=-16.0).blend
    with pytest.raises(BlendInvalid):
        world.lease("tone", weight=weight)


def test_duplicates_and_too_many_terms_are_refused(world):
    world.load("a", P[0])
    world.load("same", P[0])
    world.load("b", P[1])
    for refs in (
        [AdapterRef("a"), AdapterRef("a")],
        [AdapterRef("a"), AdapterRef("a", P[0].spec.version[:12], 0.0)],
    ):
        with pytest.raises(BlendInvalid, match="twice"):
            world.store.acquire(refs)
    with pytest.raises(BlendInvalid, match="at most 8"):
        world.store.acquire([AdapterRef("a")] * 9)
    assert world.store.leases == 0
    assert world.lease("a", "b").blend


@pytest.mark.parametrize("order", [1, -1])
def test_weights_of_names_that_mean_one_version_are_added_up(world, order):
    world.load("a", P[0])
    world.load("same", P[0])
    world.load("also", P[0])
    world.load("b", P[1])
    refs = [AdapterRef(n, None, w) for n, w in (("a", 0.1), ("same", 0.2), ("also", 0.3))]
    sum_of = Blend.of([Term(P[0].spec.version, 0.6)])
    with world.store.acquire(refs[::order]) as lease:
        assert lease.blend.digest == sum_of.digest, "0.1 + 0.2 + 0.3 is not 0.6 in every order"
        assert sorted(term.name for term in lease.terms) == ["a", "also", "same"]
        assert world.store.status("a").leases == 1
    assert world.store.status("a").leases == world.store.leases == 0


def test_weights_that_add_up_to_nothing_drop_out_and_too_much_is_refused(world):
    world.load("a", P[0])
    world.load("same", P[0])
    world.load("b", P[1])
    half = [AdapterRef("a", None, 9.0), AdapterRef("same", None, -9.0), AdapterRef("b")]
    with world.store.acquire(half) as lease:
        assert lease.blend == Blend.of([Term(P[1].spec.version, 1.0)])
        assert [term.name for term in lease.terms] == ["b"]
        assert world.store.status("a").leases == 0
    with pytest.raises(BlendInvalid, match="16"):
        world.store.acquire([AdapterRef("a", None, 9.0), AdapterRef("same", None, 9.0)])
    assert world.store.leases == 0


def test_a_refused_acquire_leases_nothing(world):
    world.load("tone", P[0])
    with pytest.raises(AdapterNotFound):
        world.lease("tone", "absent")
    assert world.store.leases == world.store.status("tone").leases == 0
    world.store.unload("tone")
    assert world.retired == [P[0].spec.version]


def test_release_is_idempotent(world):
    world.load("tone", P[0])
    first, second = world.lease("tone"), world.lease("tone")
    first.release()
    first.release()
    assert world.store.leases == 1
    second.release()
    assert world.store.leases == 0


def test_running_leases_keep_their_version_over_a_swap(world):
    old = world.load("tone", P[0])
    lease = world.lease("tone")
    new = world.load("tone", P[1], replace=True)
    assert lease.adapters == {old.version: old}
    assert torch.equal(old.flat, expected(P[0]))
    with world.lease("tone") as later:
        assert later.adapters == {new.version: new}
    assert world.store.status("tone").retired == (old.version,)
    assert not world.retired
    lease.release()
    assert world.retired == [old.version]
    assert world.store.status("tone").retired == ()


def test_memory_is_free_only_after_reclaim(world):
    for name, parsed in zip("abc", P, strict=False):
        world.load(name, parsed)
    lease = world.lease("a")
    world.store.unload("a")
    for step in (lease.release, world.reclaim_all):
        with pytest.raises(ArenaFull):
            world.store.reserve(P[3])
        step()
    assert world.load("d", P[3])


def test_the_name_is_gone_at_once_while_its_last_request_runs(world):
    adapter = world.load("tone", P[0])
    lease = world.lease("tone")
    world.store.unload("tone")
    for ref in (AdapterRef("tone"), AdapterRef("tone", adapter.version[:12])):
        with pytest.raises(AdapterNotFound):
            world.store.acquire([ref])
    assert torch.equal(adapter.flat, expected(P[0]))
    world.load("tone", P[1])
    with pytest.raises(AdapterNotFound):  # another life of the name
        world.store.acquire([AdapterRef("tone", adapter.version)])
    lease.release()
    world.reclaim_all()
    assert world.store.versions == 1


def test_versions_are_selected_by_prefix_while_they_live(world):
    old = world.load("tone", P[0])
    lease = world.lease("tone")
    new = world.load("tone", P[1], replace=True)
    for version in (old.version, new.version):
        for digits in (12, 20, 64):
            with world.store.acquire([AdapterRef("tone", version[:digits])]) as found:
                assert list(found.adapters) == [version]
    for wrong in (old.version[:11], "f" * 12, "", old.version[:12].upper(), "zzzzzzzzzzzz"):
        with pytest.raises(AdapterNotFound):
            world.store.acquire([AdapterRef("tone", wrong)])
    lease.release()
    with pytest.raises(AdapterNotFound):
        world.store.acquire([AdapterRef("tone", old.version)])


def test_the_same_content_is_stored_once(world):
    first = world.load("a", P[0])
    used = world.store.used_bytes
    assert world.load("b", P[0]) is first
    assert world.load("a", P[0], replace=True) is first
    assert world.store.used_bytes == used
    world.store.unload("a")
    assert not world.retired
    world.store.unload("b")
    assert world.retired == [first.version]


def test_the_same_content_loaded_twice_at_once_is_stored_once(world):
    with world.store.reserve(P[0]) as one, world.store.reserve(P[0]) as two:
        one.fill()
        two.fill()
        first = world.store.publish("a", one)
        assert world.store.publish("b", two) is first
    assert world.store.used_bytes == first.nbytes


def test_a_shared_reservation_keeps_its_version_alive(world):
    world.load("a", P[0])
    with world.store.reserve(P[0]) as reservation:
        world.store.unload("a")
        assert not world.retired
        reservation.fill()
        world.store.publish("b", reservation)
    assert world.lease("b")


def test_an_abandoned_shared_reservation_lets_its_version_go(world):
    world.load("a", P[0])
    with world.store.reserve(P[0]):
        world.store.unload("a")
    assert world.retired == [P[0].spec.version]


def test_a_version_revived_while_leaving_survives_the_late_reclaim(world):
    world.load("a", P[0])
    world.store.unload("a")
    again = world.load("b", P[0])
    world.reclaim_all()
    assert torch.equal(again.flat, expected(P[0]))
    with world.lease("b") as lease:
        assert lease.adapters == {again.version: again}


def test_a_version_revived_and_retired_again_waits_for_both_answers(world):
    version = world.load("a", P[0]).version
    world.store.unload("a")
    world.load("b", P[0])
    world.store.unload("b")
    assert world.retired == [version, version]
    world.store.reclaim(version)
    assert world.store.versions == 1
    world.store.reclaim(version)
    assert world.store.versions == 0
    assert world.store.used_bytes == 0


def test_an_unpublished_reservation_gives_its_room_back(world):
    with world.store.reserve(P[0]) as reservation:
        assert world.store.used_bytes == NUMEL * 4
    assert not reservation.open
    assert world.store.used_bytes == 0
    assert not world.retired


def test_a_refused_publish_changes_nothing(world):
    adapter = world.load("tone", P[0])
    with pytest.raises(AdapterExists):
        world.load("tone", P[1])
    with pytest.raises(VersionConflict):
        world.load("tone", P[1], replace=True, if_version="f" * 64)
    for name in ("", "../x", "a b", "-a", "a\n", "a" * 129, "é", "<b>"):
        with pytest.raises(AdapterInvalid, match="name"):
            world.load(name, P[1])
    assert world.store.used_bytes == adapter.nbytes
    assert [status.version for status in world.store.list()] == [adapter.version]


def test_compare_and_swap(world):
    old = world.load("tone", P[0], if_version="")
    with pytest.raises(VersionConflict, match=r"to be free.*swap it"):
        world.load("tone", P[1], if_version="")
    with pytest.raises(VersionConflict):
        world.load("other", P[1], if_version=old.version)
    new = world.load("tone", P[1], if_version=old.version[:12])
    assert new.version == P[1].spec.version
    with pytest.raises(VersionConflict):
        world.store.unload("tone", old.version)
    world.store.unload("tone", new.version)
    assert world.store.list() == ()


def test_what_can_never_fit_is_told_from_what_does_not_fit_now():
    small = World(room=1)
    with pytest.raises(AdapterTooLarge):
        small.store.reserve(make_parsed(rank=9))
    small.load("a", P[0])
    with pytest.raises(ArenaFull):
        small.store.reserve(P[1])


def test_the_number_of_names_is_limited():
    world = World(max_adapters=2)
    world.load("a", P[0])
    world.load("b", P[1])
    with pytest.raises(ArenaFull, match="limit"):
        world.load("c", P[2])
    assert world.store.used_bytes == 2 * NUMEL * 4
    world.load("b", P[2], replace=True)


def test_unknown_names_are_not_found(world):
    for ask in (world.store.unload, world.store.status, lambda n: world.store.pin(n, pinned=True)):
        with pytest.raises(AdapterNotFound):
            ask("absent")


def test_idle_names_come_longest_unused_first_without_pinned_or_leased(world):
    for name, parsed in zip("abc", P, strict=False):
        world.load(name, parsed)
    world.lease("a").release()
    assert list(world.store.idle()) == ["b", "c", "a"]
    world.store.pin("b", pinned=True)
    lease = world.lease("c")
    assert list(world.store.idle()) == ["a"]
    assert [status.pinned for status in world.store.list()] == [False, True, False]
    lease.release()
    assert list(world.store.idle()) == ["a", "c"]


def test_a_swap_leaves_the_pin_unless_it_says_otherwise(world):
    world.load("tone", P[0], pin=True)
    for options, pinned in (
        ({}, True),
        ({"pin": False}, False),
        ({}, False),
        ({"pin": True}, True),
    ):
        world.load("tone", P[1], replace=True, **options)
        assert world.store.status("tone").pinned is pinned
    world.store.unload("tone")
    world.load("tone", P[0])
    assert not world.store.status("tone").pinned


def test_a_name_that_moved_a_thousand_times_is_as_cheap_as_a_new_one(world):
    for turn in range(1000):
        world.load("tone", P[turn % 3], replace=True)
        world.reclaim_all()
    assert world.store.known_versions("tone") == {P[999 % 3].spec.version}


def test_an_arena_hands_out_what_it_has_and_no_more():
    tier = ArenaTier(torch.empty(2 * NUMEL))
    with pytest.raises(AdapterTooLarge):
        tier.allocate(2 * NUMEL + 1)
    first, second = tier.allocate(NUMEL), tier.allocate(NUMEL)
    assert first is not None
    assert second is not None
    assert tier.allocate(1) is None
    tier.free(first)
    assert tier.used_bytes == second.nbytes
    assert tier.allocate(NUMEL) is not None
