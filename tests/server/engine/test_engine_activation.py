"""Adapters that apply from a place in the prompt on: whose blocks are whose, and what runs when."""

from dataclasses import replace

import pytest

from fader_server.core import Request
from fader_server.engine import blocks
from fader_server.engine.roster import Roster
from fader_server.phases import Phase, phases_of
from tests.server.engine.engine_world import World, blend_of, expected, request
from tests.support.activation import terms_at

P, Q = ("p", 1.0), ("q", 1.0)
"""Activated by 3, 4 and by 5."""
SAID = tuple(range(10, 30))
"""A conversation of five blocks, which activates nothing."""


def ask(name: str, prompt: tuple[int, ...], *terms: tuple[str, float], **others) -> Request:
    return request(name, prompt, blend=blend_of(*terms), max_tokens=5, **others)


def cached(world: World, *requests: Request) -> list[int]:
    """Tokens that each found, one after the other; answers are those of each alone."""
    seen = []
    for one in requests:
        seen.append(world.submit(one))
        world.finish()
    return [one.cached for one in seen]


def roomy(**others: int) -> World:
    return World(blocks=80, max_model_len=64, capacity=4, **others)


def test_a_chunk_ends_where_an_adapter_begins_and_has_the_terms_of_all_its_tokens():
    world = roomy(max_step_tokens=40, chunk_size=30)
    one = ask("r", (*SAID, 5, *range(30, 36), 3, 4, 9), ("a", 0.5), P, Q)
    world.submit(one)
    world.finish()
    rows = [row for plan in world.device.plans for row in plan.rows]
    assert [(row.start, row.count) for row in rows[:3]] == [(0, 20), (20, 7), (27, 3)]
    assert [len(row.sequence.terms[i].terms) for i, row in enumerate(rows[:3])] == [1, 2, 3]
    for row in rows[:3]:
        every = {terms_at(one, at) for at in range(row.start, row.start + row.count)}
        assert len(every) == 1


def test_what_comes_before_an_adapter_is_everybodys_who_has_the_same_until_there():
    world = roomy()
    found = cached(
        world,
        ask("base", SAID),
        ask("p", (*SAID, 3, 4, 9, 9), P),
        ask("q", (*SAID, 5, 9), Q),
        ask("half of p", (*SAID, 3, 4, 9), ("p", 0.5)),
        ask("again", (*SAID, 3, 4, 9, 9, 9), P),
        ask("base of more", (*SAID, 3, 4, 9, 9, 9)),
        ask("another", (*SAID, 3, 4, 9), ("a", 1.0)),
        ask("beside another", (*SAID, 3, 4, 9), ("a", 1.0), P),
    )
    assert found == [0, 20, 20, 20, 24, 20, 0, 20]
    # the first found the whole prompt but for its last block, which is always computed
    assert cached(world, ask("base again", SAID)) == [16]


def test_an_activated_adapter_leaves_to_the_base_what_it_computed_before_it_began():
    world = roomy()
    assert cached(world, ask("p", (*SAID, 3, 4), P), ask("base", (*SAID, 1))) == [0, 20]


def test_an_answer_of_the_base_is_found_by_who_is_activated_after_it():
    world = roomy()
    (first,) = [world.submit(request("base", SAID, max_tokens=9))]
    world.finish()
    said = (*SAID, *first.tokens)
    assert cached(world, ask("p", (*said, 3, 4), P)) == [28]


@pytest.mark.parametrize("cut", range(1, 4))
def test_a_block_in_which_an_adapter_begins_is_found_by_who_begins_there_only(cut):
    """The block from 20 on, `cut` tokens of it before the adapter."""
    world = roomy()
    text = (*SAID, *range(30, 30 + cut), 3, 4, *range(40, 50))
    found = cached(
        world,
        ask("p", text, P),
        ask("again", text, P),
        ask("base", text),
        ask("half", text, ("p", 0.5)),
        ask("later", (*text, 3, 4), P),
    )
    assert found == [0, 32, 20, 20, 32]


def test_who_is_not_invoked_is_the_base():
    world = roomy()
    text = (*SAID, 3, 1)
    assert cached(world, ask("base", text), ask("p", text, P)) == [0, 20]
    answers = [world.seen[name].tokens for name in ("base", "p")]
    assert answers[0] == answers[1]
    assert not any(row.terms for plan in world.device.plans for row in plan.terms.rows)


def test_an_adapter_from_the_first_token_on_shares_nothing_with_the_base():
    world = roomy()
    text = (3, 4, *SAID)
    assert cached(world, ask("base", text), ask("p", text, P), ask("again", text, P)) == [0, 0, 20]


def test_tenants_share_nothing_of_it():
    world = roomy()
    text = (*SAID, 3, 4, 9)
    found = cached(
        world,
        ask("base", SAID, salt="x/"),
        ask("other", text, P, salt="y/"),
        ask("same", text, P, salt="x/"),
    )
    assert found == [0, 0, 20]


def test_a_block_shared_wrongly_would_show(monkeypatch):
    monkeypatch.setattr(blocks, "turn", lambda phase, at: b"")
    world = roomy()
    text = (*SAID, 30, 3, 4, *range(40, 50))
    with pytest.raises(AssertionError):
        cached(world, ask("base", text), ask("p", text, P))


def preempted(world: World) -> Request:
    """One whose answer holds the invocation that its prompt lacks; sent back after that."""
    tries = (request("r", SAID, blend=blend_of(Q), max_tokens=12, seed=n) for n in range(1000))
    one = next(own for own in tries if 5 in expected(own)[:6])
    seen = world.submit(one)
    while len(seen.tokens) < 7:
        world.turn()
    world.scheduler.preempt(world.scheduler._roster.open["r"])
    world.finish()
    assert world.scheduler.preemptions == 1
    return one


def test_an_invocation_that_was_generated_changes_nothing_after_a_preemption_either():
    one = preempted(roomy())
    assert one.phases == (Phase(0, blend_of()),)


def test_one_that_did_would_show(monkeypatch):
    send_back = Roster.send_back

    def searched(self, sequence):
        send_back(self, sequence)
        own = sequence.request
        found = phases_of(sequence.tokens, own.blend, own.adapters)
        sequence.request = replace(own, phases=found)
        sequence.keys.clear()

    monkeypatch.setattr(Roster, "send_back", searched)
    with pytest.raises(AssertionError):
        preempted(roomy())


def test_generated_tokens_that_are_computed_again_keep_their_adapter():
    world = roomy()
    world.blocks.findable = False
    seen = world.submit(request("r", (*SAID, 3, 4), blend=blend_of(P), max_tokens=12))
    while len(seen.tokens) < 7:
        world.turn()
    before = len(world.device.plans)
    world.scheduler.preempt(world.scheduler._roster.open["r"])
    world.finish()
    again = [row for plan in world.device.plans[before:] for row in plan.rows]
    assert any(row.start >= 22 and row.count > 1 for row in again)
    assert seen.tokens == expected(seen.request)


def test_logprobs_of_a_prompt_are_each_under_its_own_blend():
    world = roomy(max_step_tokens=40, chunk_size=30)
    text = (*SAID, 5, *range(30, 33), 3, 4, 9, 8)
    seen = world.submit(ask("r", text, P, Q, prompt_logprobs=0))
    world.finish()  # compares with the definition
    base = world.submit(ask("base", text, prompt_logprobs=0))
    world.finish()
    same = [a == b for a, b in zip(seen.scores, base.scores, strict=True)]
    assert same == [True] * 20 + [False] * 7
