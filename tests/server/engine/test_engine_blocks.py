import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fader_adapters.spec import Blend, Digest
from fader_server.core import Sequence
from fader_server.engine import blocks as blocks_module
from fader_server.engine.blocks import BlockManager, chain_seed
from fader_server.errors import ConfigInvalid
from tests.server.engine.engine_world import blend_of, request

PROMPT = tuple(range(13))  # three full blocks of four, and a partial one


def sequence(blend: Blend | None = None, salt: str = "", prompt: tuple[int, ...] = PROMPT):
    one = request("r", prompt, blend=blend, salt=salt)
    return Sequence(one, list(prompt))


def hold(blocks: BlockManager, one: Sequence) -> int:
    """Admit as the scheduler does; returns the number of hits."""
    sought = (len(one.tokens) - 1) // blocks.block_size
    hits = blocks.find(one, sought)
    blocks.admit(one, hits, total=blocks.blocks_for(len(one.tokens)), sought=sought)
    return len(hits)


def cache(blocks: BlockManager, one: Sequence) -> None:
    hold(blocks, one)
    one.computed = len(one.tokens)
    blocks.publish(one)
    blocks.release(one)


def hits_across(first: Sequence, second: Sequence) -> int:
    blocks = BlockManager(20, block_size=4)
    cache(blocks, first)
    return len(blocks.find(second, 3))


def test_block_zero_is_never_handed_out():
    blocks = BlockManager(5, block_size=4)
    one = sequence()
    hold(blocks, one)
    assert sorted(one.blocks) == [1, 2, 3, 4]
    assert not blocks.grow(one)


def test_too_small_a_pool_is_refused():
    with pytest.raises(ConfigInvalid, match="at least 2 blocks"):
        BlockManager(1)


def test_same_prefix_is_found_up_to_the_last_full_block():
    assert hits_across(sequence(), sequence()) == 3


def test_other_tokens_are_found_up_to_where_they_part():
    assert hits_across(sequence(), sequence(prompt=(*range(9), 99, 98, 97, 96))) == 2
    assert hits_across(sequence(), sequence(prompt=(99, *range(1, 13)))) == 0


STRANGERS = {
    "version": (blend_of(("a", 1.0)), "", blend_of(("b", 1.0)), ""),
    "base and adapter": (Blend(), "", blend_of(("a", 1.0)), ""),
    "last bit of gamma": (blend_of(("a", 0.5)), "", blend_of(("a", math.nextafter(0.5, 1.0))), ""),
    "sign of gamma": (blend_of(("a", 0.5)), "", blend_of(("a", -0.5)), ""),
    "salt": (blend_of(("a", 1.0)), "x", blend_of(("a", 1.0)), "y"),
    "no salt": (blend_of(("a", 1.0)), "", blend_of(("a", 1.0)), "\0"),
    "swapped weights": (
        blend_of(("a", 0.5), ("b", 0.25)),
        "",
        blend_of(("a", 0.25), ("b", 0.5)),
        "",
    ),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_strangers_never_find_each_others_blocks(kind):
    blend, salt, other, other_salt = STRANGERS[kind]
    assert hits_across(sequence(blend, salt), sequence(other, other_salt)) == 0
    assert hits_across(sequence(blend, salt), sequence(blend, salt)) == 3


def test_the_check_of_strangers_notices_a_seed_that_ignores_the_blend(monkeypatch):
    def deaf(blend: Digest, salt: str, block_size: int) -> bytes:
        return chain_seed(Blend().digest, salt, block_size)

    monkeypatch.setattr(blocks_module, "chain_seed", deaf)
    blend, salt, other, other_salt = STRANGERS["version"]
    assert hits_across(sequence(blend, salt), sequence(other, other_salt)) == 3


def test_blocks_are_not_findable_before_they_are_published():
    blocks = BlockManager(20, block_size=4)
    one = sequence()
    hold(blocks, one)
    assert blocks.find(sequence(), 3) == []
    one.computed = 7
    blocks.publish(one)
    assert blocks.find(sequence(), 3) == one.blocks[:1]  # the second is half full


def test_hits_are_pinned_before_anything_is_allocated():
    blocks = BlockManager(5, block_size=4)
    cache(blocks, sequence())
    assert (blocks.cached, blocks.free) == (3, 1)
    one = sequence()
    hits = blocks.find(one, 3)
    assert blocks.room(hits) == 1  # what is found is not room
    assert hold(blocks, one) == 3
    assert len(set(one.blocks)) == 4


def test_the_oldest_cached_blocks_are_reused_first_and_a_tail_before_its_prefix():
    blocks = BlockManager(7, block_size=4)
    first, second = sequence(prompt=tuple(range(9))), sequence(prompt=tuple(range(20, 29)))
    cache(blocks, first)
    cache(blocks, second)
    assert (blocks.cached, blocks.free) == (4, 2)
    hold(blocks, sequence(prompt=tuple(range(40, 49))))  # three blocks: one is cached
    assert len(blocks.find(first, 2)) == 1
    assert len(blocks.find(second, 2)) == 2


def test_withdrawn_blocks_are_not_found_again():
    blocks = BlockManager(20, block_size=4)
    one = sequence()
    hold(blocks, one)
    one.computed = 13
    blocks.publish(one)
    assert len(blocks.find(sequence(), 3)) == 3
    blocks.withdraw(one)
    blocks.release(one)
    assert blocks.find(sequence(), 3) == []
    assert (blocks.used, blocks.cached, blocks.free) == (0, 0, 19)


def test_a_block_is_hashed_once_however_often_it_is_sought(monkeypatch):
    blocks = BlockManager(20, block_size=4)
    cache(blocks, sequence())
    one = sequence()
    blocks.find(one, 3)
    keys = list(one.keys)
    monkeypatch.setattr(blocks_module.hashlib, "sha256", None)
    assert len(blocks.find(one, 3)) == 3
    assert one.keys == keys


def test_queries_and_hits_are_counted_when_a_request_is_admitted():
    blocks = BlockManager(20, block_size=4)
    cache(blocks, sequence())
    blocks.find(sequence(), 3)  # looking is free
    hold(blocks, sequence())
    assert (blocks.queries, blocks.hits) == (6, 3)


class BlockMachine(RuleBasedStateMachine):
    """Any order of admit, compute, publish, withdraw and release."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(9, block_size=2)
        self.live: list[Sequence] = []
        self.owner: dict[int, tuple] = {}

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=7),
        gamma=st.sampled_from([0.0, 0.5, 1.0]),
    )
    def admit(self, prompt, gamma):
        one = sequence(blend_of(("a", gamma)), prompt=tuple(prompt))
        sought = (len(prompt) - 1) // 2
        hits = self.blocks.find(one, sought)
        total = self.blocks.blocks_for(len(prompt))
        for index, block in enumerate(hits):  # what is found was written for the same prefix
            assert self.owner[block] == self.content(one, index)
        if self.blocks.room(hits) < total - len(hits):
            return
        self.blocks.admit(one, hits, total=total, sought=sought)
        one.computed = len(hits) * 2
        for block in one.blocks[len(hits) :]:
            self.owner[block] = ("unwritten",)
        self.live.append(one)

    @staticmethod
    def content(one: Sequence, index: int) -> tuple:
        return (one.request.blend.digest, *one.tokens[: (index + 1) * 2])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def compute(self, data):
        one = data.draw(st.sampled_from(self.live))
        fresh = range(one.published, len(one.tokens) // 2)
        for index in fresh:
            assert self.blocks._refs[one.blocks[index]] == 1, "wrote into a shared block"
            self.owner[one.blocks[index]] = self.content(one, index)
        one.computed = len(one.tokens)
        self.blocks.publish(one)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), withdraw=st.booleans())
    def release(self, data, withdraw):
        one = data.draw(st.sampled_from(self.live))
        self.live.remove(one)
        if withdraw:
            self.blocks.withdraw(one)
        self.blocks.release(one)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def extend(self, data, token):
        one = data.draw(st.sampled_from(self.live))
        if len(one.tokens) == len(one.blocks) * 2:
            if not self.blocks.grow(one):
                assert self.blocks.free + self.blocks.cached == 0
                return
            self.owner[one.blocks[-1]] = ("unwritten",)
        one.tokens.append(token)

    @invariant()
    def books_balance(self):
        held = [b for one in self.live for b in one.blocks]
        assert sum(self.blocks._refs) == len(held)
        assert 0 not in held
        assert self.blocks.used == len(set(held))
        assert self.blocks.used + self.blocks.cached + self.blocks.free == self.blocks.total
        assert set(self.blocks._free).isdisjoint(held)
        assert set(self.blocks._cached).isdisjoint(held)
        assert sorted(self.blocks._by_key.values()) == sorted(
            b for b, key in enumerate(self.blocks._key_of) if key is not None
        )


BlockMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestBlocksInAnyOrder = BlockMachine.TestCase
