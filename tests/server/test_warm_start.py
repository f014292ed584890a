"""A server that warmed up at start records nothing under its first requests."""

import pytest

from fader_adapters.kernels import native
from fader_server.engine.warmup import warm_up
from fader_server.model.decode import decodes
from fader_server.model.recording import Recorder
from tests.support.families import write_family
from tests.support.replays import answered
from tests.support.world import Ask, TinyWorld, greedy

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "built")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_family("llama", tmp_path_factory.mktemp("base"))


def serve(world):
    asks = [Ask(list(range(5, 25 + 40 * i)), {}, greedy(6, logprobs=2)) for i in range(3)]
    return answered(world, asks)


def warmed(source, **others):
    world = TinyWorld(source, **others)
    limits, vocab = world.scheduler.limits, world.base.vocab_size
    warm_up(world.runner, world.blocks, limits, vocab=vocab, seconds=60.0)
    return world


@pytest.mark.parametrize("warm", [True, False])
def test_no_request_waits_for_a_recording(llama, warm, monkeypatch):
    world = warmed(llama) if warm else TinyWorld(llama)
    recorded, record = [], Recorder.record
    monkeypatch.setattr(Recorder, "record", lambda *a: (recorded.append(a), record(*a))[1])
    ran, forward = [], world.runner._forward
    monkeypatch.setattr(world.runner, "_forward", lambda *a: (ran.append(a), forward(*a))[1])
    serve(world)
    assert bool(recorded) == bool(ran) == (not warm)


def test_a_backend_that_records_nothing_learns_nothing(llama):
    assert TinyWorld(llama).runner.learns
    assert not TinyWorld(llama, backend="reference").runner.learns


def test_answers_are_those_of_a_server_that_did_not(llama):
    world = warmed(llama, blocks=600)
    assert world.runner._replays.prefill._enabled
    assert world.runner._replays.decode._enabled
    assert serve(world) == serve(TinyWorld(llama))


def test_a_recording_is_proven_on_other_tokens_than_it_was_learnt_from(llama, monkeypatch):
    world = TinyWorld(llama)
    seen, run = {}, world.runner.run

    def noting(plan):
        if decodes(plan):
            tokens = [row.sequence.tokens[row.start] for row in plan.rows]
            seen.setdefault(len(plan.rows), []).append(tokens)
        return run(plan)

    monkeypatch.setattr(world.runner, "run", noting)
    limits, vocab = world.scheduler.limits, world.base.vocab_size
    warm_up(world.runner, world.blocks, limits, vocab=vocab, seconds=60.0)
    assert len(seen) > 5
    for first, second in seen.values():
        assert not set(first) & set(second)
