"""Seeded worlds: all chance comes from one seed, so a bad world is replayed by its number."""

import random
from contextlib import suppress
from dataclasses import replace

import pytest

from fader_adapters.errors import AdapterTooLarge
from fader_server.core import Sequence
from fader_server.engine import blocks, draft
from fader_server.engine.blocks import BlockManager
from fader_server.engine.lookup import Lookup
from fader_server.engine.roster import Roster
from fader_server.model.state_slots import NOBODY, StateSlots
from tests.server.engine.engine_device import LOOPS, Ahead, Stateful
from tests.server.engine.engine_guides import Turns
from tests.server.engine.engine_world import FakePool, World, blend_of, request, version

NAMES = ("a", "b", "c", "p", "q", "d")  # p and q are activated
SIZES = {version("c"): 2, version("d"): 4}  # d never fits


def build(
    rng: random.Random, *, ahead: bool = False, states: bool = False, lookup: int = 0
) -> World:
    rows, chunk = rng.randint(1, 5), rng.choice([4, 8, 11])
    return World(
        blocks=rng.randint(9, 40),
        max_rows=rows,
        chunk_size=chunk,
        max_step_tokens=rows + chunk + rng.randint(0, 12),
        max_model_len=32,
        max_overtakes=rng.randint(0, 3),
        capacity=3,
        ahead=ahead,
        states=states,
        lookup=lookup,
    )


def draw_request(rng: random.Random, name: str, *, loops: bool = False):
    terms = rng.sample(NAMES if rng.random() < 0.1 else NAMES[:-1], rng.choice([0, 1, 1, 2, 3]))
    start, wrap = rng.randint(0, 1), rng.choice([50, 9])
    return request(
        name,
        [token % wrap for token in range(start, start + rng.randint(1, 20))],
        blend=blend_of(*((t, rng.choice([0.5, 1.0])) for t in terms)),
        sizes=SIZES,
        salt=rng.choice(["", "", "x"]),
        max_tokens=rng.randint(0, 12),
        min_tokens=rng.choice([0, 0, 3]),
        stop_token_ids=frozenset(rng.sample(range(50), rng.choice([0, 5]))),
        prompt_logprobs=rng.choice([None, None, 0]),
        seed=rng.randint(0, 2) + (LOOPS if loops else 0),
        guide=draw_guide(rng) if rng.random() < 0.1 else None,
    )


def draw_guide(rng: random.Random) -> Turns:
    fault = {rng.choice(["faulty_mask", "faulty_token"]): rng.randint(0, 9)}
    return Turns(rng.randint(1, 12), **(fault if rng.random() < 0.2 else {}))


def disturb(rng: random.Random, world: World) -> None:
    """At most one fault or command, as other threads and the device would."""
    device, any_id = world.device, rng.choice(list(world.seen) or ["none"])
    match rng.randint(0, 15):
        case 0 if world.seen:
            world.abort(any_id)
        case 1:
            world.pool.forget(version(rng.choice(NAMES)))
        case 2:
            device.culprits.add(any_id)
        case 3:
            device.nan.add(any_id)
        case 4:
            device.out_of_memory_above = rng.choice([2, 5, 10**9, 10**9])
        case 5:
            lost = rng.sample(NAMES, rng.choice([0, 0, 1]))
            device.bad_uploads = {version(name) for name in lost}
        case 6:
            world.pool.fail_acquires = rng.choice([0, 1, 2])


def live(seed: int, *, states: bool = False, guesses: bool = False) -> World:
    """One world, from its first request to the last event; raises on any broken promise."""
    rng = random.Random(seed)
    world = build(rng, ahead=bool(seed % 2), states=states, lookup=2 + seed % 4 if guesses else 0)
    for turn in range(rng.randint(1, 30)):
        for index in range(rng.choice([0, 0, 1, 1, 3])):
            with suppress(AdapterTooLarge):  # "d", refused at the door
                world.submit(draw_request(rng, f"{turn}.{index}", loops=guesses))
        disturb(rng, world)
        world.turn()
        world.check()
    world.finish()
    return world


def test_no_world_breaks_a_promise():
    worlds = [live(seed) for seed in range(250)]
    seen = [s for world in worlds for s in world.seen.values()]
    ends = [s.finish or type(s.error).__name__ for s in seen if not s.aborted]
    assert {"stop", "length", "EngineFault", "NumericFault"} == set(ends)
    assert sum(w.scheduler.preemptions for w in worlds) > 20
    assert sum(s.cached > 0 for s in seen) > 20
    assert sum(s.cached > 0 for s in seen if len(s.request.phases) > 1) > 20
    assert sum(w.device.led for w in worlds if isinstance(w.device, Ahead)) > 200


def test_no_world_where_rows_go_on_from_states_breaks_a_promise(monkeypatch):
    monkeypatch.setattr(draft, "_LEAST", 4)  # prompts are short here
    worlds = [live(seed, states=True) for seed in range(250)]
    slots = [w.device.slots for w in worlds if isinstance(w.device, Stateful)]
    assert sum(w.scheduler.preemptions for w in worlds) > 20
    assert sum(s.cached > 0 for w in worlds for s in w.seen.values()) > 20
    assert all(own.count <= own.most for own in slots)
    assert sum(own.kept for own in slots) > 200


def test_no_world_with_guesses_breaks_a_promise():
    out_of_memory_without_one_that_ended = 2755
    seeds = (*range(250), out_of_memory_without_one_that_ended)
    worlds = [live(seed, guesses=True) for seed in seeds]
    looked = [w.scheduler.lookup for w in worlds]
    assert sum(own.accepted for own in looked) > 100
    assert sum(own.guessed - own.accepted for own in looked) > 20
    assert sum(w.scheduler.preemptions for w in worlds) > 20


@pytest.mark.slow
def test_no_world_of_many_breaks_a_promise():
    for seed in range(600, 4_000):
        live(seed, states=seed % 3 == 0, guesses=seed % 3 == 1)


def test_a_world_is_replayed_by_its_seed():
    first, second = live(7), live(7)
    assert [(n, s.tokens, s.finish, s.aborted) for n, s in first.seen.items()] == [
        (n, s.tokens, s.finish, s.aborted) for n, s in second.seen.items()
    ]
    assert [p.tokens for p in first.device.plans] == [p.tokens for p in second.device.plans]


def publish_at_plan(monkeypatch):
    """Blocks can be found before they are written."""
    admit = BlockManager.admit

    def early(self, sequence: Sequence, hits, *, total, sought):
        admit(self, sequence, hits, total=total, sought=sought)
        computed, sequence.computed = sequence.computed, len(sequence.tokens)
        self.publish(sequence)
        sequence.computed = computed

    monkeypatch.setattr(BlockManager, "admit", early)


def release_twice(monkeypatch):
    """A lease is given back once too often."""
    release = FakePool.release

    def twice(self, versions):
        release(self, versions)
        for v in versions:
            if self.pins[v] > 0:
                self.pins[v] -= 1

    monkeypatch.setattr(FakePool, "release", twice)


def keep_pins_on_preemption(monkeypatch):
    """A lease leaks when its request is sent back."""
    send_back = Roster.send_back

    def leak(self, sequence: Sequence):
        if sequence.request.adapters:
            self._pool.acquire(sequence.request.adapters)
        send_back(self, sequence)

    monkeypatch.setattr(Roster, "send_back", leak)


def share_partial_blocks(monkeypatch):
    """A block is shared before it is full."""

    def eager(self, sequence: Sequence):
        for index in range(-(-sequence.computed // self.block_size)):
            key = self._key(sequence, index)
            if key not in self._by_key and self._key_of[sequence.blocks[index]] is None:
                self._by_key[key] = sequence.blocks[index]
                self._key_of[sequence.blocks[index]] = key

    monkeypatch.setattr(BlockManager, "publish", eager)


def free_while_used(monkeypatch):
    """A hit is not pinned."""

    def unpinned(self, sequence: Sequence, hits, *, total, sought):
        sequence.blocks = [self._take() for _ in range(total - len(hits))]
        sequence.blocks[:0] = hits
        for block in hits:
            self._refs[block] += 1
        sequence.published = len(hits)

    monkeypatch.setattr(BlockManager, "admit", unpinned)


def move_guides_when_sent_back(monkeypatch):
    """A guide that does not stay where its output is."""
    send_back = Roster.send_back

    def moved(self, sequence: Sequence):
        send_back(self, sequence)
        guide = sequence.request.guide
        if isinstance(guide, Turns):
            sequence.request = replace(sequence.request, guide=guide.fresh())

    monkeypatch.setattr(Roster, "send_back", moved)


def forget_the_end(monkeypatch):
    """An error that nobody is told of."""
    monkeypatch.setattr(
        "fader_server.engine.scheduler.Scheduler.fail",
        lambda self, request_id, error: (self.abort(request_id) and []) or [],
    )


def write_over_what_is_kept(monkeypatch):
    """A sequence goes on writing to a slot that others may go on from."""

    def own(self, held, at):
        if held.slots[at] == NOBODY:
            held.slots[at] = self._take()
        return held.slots[at]

    monkeypatch.setattr(StateSlots, "_own", own)


def take_what_is_resumed(monkeypatch):
    """A state makes room for another while somebody goes on from it."""
    resume = StateSlots.resume

    def unheld(self, sequence, key, tokens):
        resume(self, sequence, key, tokens)
        self._users[self._kept[key]] -= 1

    monkeypatch.setattr(StateSlots, "resume", unheld)


def keep_under_the_block_before(monkeypatch):
    """A state that stands for a block more than its key says."""
    keep = StateSlots.keep
    monkeypatch.setattr(
        StateSlots, "keep", lambda self, s, key, n: keep(self, s, s.keys[max(0, n - 2)], n)
    )


def find_blocks_without_states(monkeypatch):
    """A prefix is as long as its blocks."""
    monkeypatch.setattr(StateSlots, "longest", lambda self, keys: len(keys))


def share_across_an_activation(monkeypatch):
    """A block in which an adapter begins is found by who has another there, or none."""
    monkeypatch.setattr(blocks, "turn", lambda phase, at: b"")


def run_over_an_activation(monkeypatch):
    """A chunk has the terms of its first token to its end."""
    chunk = draft.Draft.chunk

    def over(self, sequence: Sequence, start: int):
        phases = sequence.request.phases
        object.__setattr__(sequence.request, "phases", phases[:1])
        count = chunk(self, sequence, start)
        object.__setattr__(sequence.request, "phases", phases)
        return count

    monkeypatch.setattr(draft.Draft, "chunk", over)


def believe_guesses(monkeypatch):
    """What was computed after a guess counts, whatever came."""
    monkeypatch.setattr(Lookup, "came", lambda self, row: True)


def believe_later_guesses(monkeypatch):
    """A guess is right by its own token, whatever came before it."""

    def came(self, row):
        return row.start < len(row.sequence.tokens) or row.sequence.tokens[-1] == row.guesses[-1]

    monkeypatch.setattr(Lookup, "came", came)


OF_GUESSES = [believe_guesses, believe_later_guesses]
OF_STATES = [
    write_over_what_is_kept,
    take_what_is_resumed,
    keep_under_the_block_before,
    find_blocks_without_states,
]
PLANTED = [
    publish_at_plan,
    release_twice,
    keep_pins_on_preemption,
    share_partial_blocks,
    free_while_used,
    move_guides_when_sent_back,
    forget_the_end,
    share_across_an_activation,
    run_over_an_activation,
]


@pytest.mark.parametrize("plant", [*PLANTED, *OF_STATES, *OF_GUESSES])
def test_the_simulation_notices(plant, monkeypatch):
    plant(monkeypatch)
    for seed in range(600):
        try:
            live(seed, states=plant in OF_STATES, guesses=plant in OF_GUESSES)
        except Exception:  # noqa: BLE001 - a broken promise may show itself in any way
            return
    pytest.fail("the planted bug went unnoticed")
