"""Claims: versions that recipes keep when their name moves on, and names that they take."""

import pytest
import torch

from fader_adapters.claims import Claims
from fader_adapters.errors import AdapterNotFound, NameReserved
from fader_adapters.leases import AdapterRef
from tests.adapters.store_world import NUMEL, P, World, expected


@pytest.fixture
def world():
    return World()


def claims(*versions, names=()):
    return Claims(frozenset(names), frozenset(versions))


def test_a_claimed_version_outlives_a_swap_and_goes_with_its_claim(world):
    old = world.load("tone", P[0]).version
    world.store.claim(claims(("tone", old)))
    new = world.load("tone", P[1], replace=True).version
    assert not world.retired
    assert world.store.status("tone").retired == (old,)
    with world.store.acquire([AdapterRef("tone", old[:12])]) as lease:
        assert list(lease.adapters) == [old]
    assert world.store.status("tone", old).version == old
    assert world.store.status("tone").version == new
    world.store.claim(claims())
    assert world.retired == [old]
    with pytest.raises(AdapterNotFound):
        world.store.acquire([AdapterRef("tone", old)])


def test_without_its_claim_the_version_would_have_gone(world):
    old = world.load("tone", P[0]).version
    world.store.claim(claims(("other", old), ("tone", P[3].spec.version)))
    world.load("tone", P[1], replace=True)
    assert world.retired == [old]


def test_unloading_a_name_ends_its_claims_until_the_version_is_back(world):
    old = world.load("tone", P[0]).version
    world.store.claim(claims(("tone", old)))
    world.load("tone", P[1], replace=True)
    world.store.unload("tone")
    assert set(world.retired) == {old, P[1].spec.version}
    world.reclaim_all()
    assert world.store.versions == 0
    world.load("tone", P[0])
    world.load("tone", P[1], replace=True)
    assert world.store.status("tone").retired == (old,)


def test_a_claim_is_for_one_name(world):
    version = world.load("a", P[0]).version
    world.load("b", P[0])
    world.store.claim(claims(("b", version)))
    world.load("a", P[1], replace=True)
    world.load("b", P[1], replace=True)
    with pytest.raises(AdapterNotFound):
        world.store.acquire([AdapterRef("a", version)])
    assert world.store.acquire([AdapterRef("b", version)])


def test_a_claim_made_after_the_swap_takes_over_from_a_lease(world):
    old = world.load("tone", P[0]).version
    lease = world.lease("tone")
    world.load("tone", P[1], replace=True)
    world.store.claim(claims(("tone", old)))
    lease.release()
    assert not world.retired
    assert world.store.acquire([AdapterRef("tone", old)])


def test_claimed_names_and_adapters_exclude_each_other(world):
    world.load("tone", P[0])
    with pytest.raises(NameReserved, match="tone"):
        world.store.claim(claims(names=("warm", "tone")))
    assert world.load("warm", P[1])
    world.store.unload("warm")
    world.store.claim(claims(names=("warm",)))
    with pytest.raises(NameReserved, match="warm"):
        world.load("warm", P[1])
    assert world.store.used_bytes == 2 * NUMEL * 4  # the second one is leaving
    world.store.claim(claims())
    assert world.load("warm", P[1])


def test_a_claimed_version_is_adopted_beside_the_one_of_its_name(world):
    current = world.load("tone", P[1]).version
    old = P[0].spec.version
    world.store.claim(claims(("tone", old)))
    with world.store.reserve(P[0]) as reservation:
        reservation.fill()
        with pytest.raises(AdapterNotFound):
            world.store.adopt("absent", reservation)
        world.store.adopt("tone", reservation)
    assert world.store.status("tone").version == current
    assert world.store.status("tone").retired == (old,)
    assert torch.equal(world.store.acquire([AdapterRef("tone", old)]).adapters[old].flat,
                       expected(P[0]))  # fmt: skip


def test_what_nobody_claims_is_not_adopted(world):
    world.load("tone", P[1])
    with world.store.reserve(P[0]) as reservation:
        reservation.fill()
        world.store.adopt("tone", reservation)
    assert world.retired == [P[0].spec.version]


def test_a_name_with_a_claimed_version_is_not_idle(world):
    old = world.load("tone", P[0]).version
    world.load("other", P[2])
    world.store.claim(claims(("tone", old)))
    world.load("tone", P[1], replace=True)
    assert list(world.store.idle()) == ["other"]
    world.store.claim(claims())
    assert list(world.store.idle()) == ["other", "tone"]


def test_a_claim_that_passes_to_another_name_lets_nothing_go_on_the_way(world):
    old = world.load("a", P[0]).version
    world.load("b", P[0])
    world.store.claim(claims(("a", old), ("b", old)))
    for name in "ab":
        world.load(name, P[1], replace=True)
    world.store.claim(claims(("a", old)))
    world.store.claim(claims(("b", old)))
    assert world.store.status("a").retired == ()
    assert world.store.status("b").retired == (old,)
    assert not world.retired
    world.store.claim(claims())
    assert world.retired == [old]
