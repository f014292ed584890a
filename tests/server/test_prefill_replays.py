"""Steps with prompts: replays of any size give the bits of the model's code, or are not used."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from fader_adapters.kernels import native
from fader_server.model import shaped
from fader_server.model.recording import Unrepeatable
from fader_server.model.shaped import ShapedReplay
from fader_server.model.sizes import SIZES, Linear, Size
from tests.support.families import CONFIGS
from tests.support.many_families import MANY, write_many
from tests.support.replays import BLENDS, QUICK, answered, opened, write
from tests.support.world import Ask, greedy

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "built")

WARM = len(SIZES) + 2
"""Steps with prompts before the first replays are trusted, and one more."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in sorted(CONFIGS)],
)
def family(request, tmp_path_factory):
    return write(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write("llama", tmp_path_factory.mktemp("one"))


def ask(length: int, blend: Mapping[str, float], *, start: int = 5, **kwargs) -> Ask:
    return Ask(list(range(start, start + length)), blend, greedy(6, logprobs=2, **kwargs))


def warm(world):
    return [answered(world, [ask(20 + 3 * turn, {}, start=60 + turn)]) for turn in range(WARM)]


def serve(world):
    """Prompts of many lengths, alone and packed, beside rows that decode."""
    answers = warm(world)
    for turn in range(2):  # proven, then replayed
        answers.append(answered(world, [ask(100, BLENDS[1], start=200 + turn)]))
        pair = [ask(80 + 9 * i, BLENDS[i], start=300 + 20 * turn + i) for i in range(2)]
        answers.append(answered(world, pair))
    for turn, rows in enumerate((1, 3, 4)):
        asks = [ask(7 + 31 * i + turn, blend) for i, blend in enumerate(BLENDS[:rows])]
        answers.append(answered(world, asks))
    return answers


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16]
)
def test_replayed_steps_give_the_bits_of_the_models_code(family, dtype):
    world = opened(family, dtype)
    replayed = serve(world)
    assert world.runner._replays.prefill._enabled
    assert world.runner._replays.prefill._trusted >= {5, 6, 7, 8}
    assert replayed == serve(opened(family, dtype, replays=False))


def test_once_trusted_the_models_code_runs_no_more(llama, monkeypatch):
    expected = serve(opened(llama, replays=False))
    world = opened(llama)
    assert serve(world) == expected
    ran = []
    forward = world.runner._forward
    monkeypatch.setattr(world.runner, "_forward", lambda *a: (ran.append(a), forward(*a))[1])
    again = [ask(83, BLENDS[1], start=9)]  # a length that nobody had
    assert (83).bit_length() in world.runner._replays.prefill._trusted
    assert answered(world, again) == answered(opened(llama, replays=False), again)
    assert not ran
    world.run([Ask(list(range(9)), {}, greedy(2, prompt_logprobs=0))])
    assert ran, "logits of a prompt are not recorded"


def counting(world):
    """Let one of its layers ask an operator for as many elements as there are tokens."""
    norm = world.base.model.model.decoder.layers[0].final_layer_norm
    norm.register_forward_hook(lambda _, args, out: out + torch.zeros(out.shape[1], 1).to(out))
    return world


@pytest.mark.parametrize(("name", "dtype"), [("opt", torch.bfloat16), ("opt", torch.float32)])
@pytest.mark.parametrize("wrong", [0, 1])
def test_numbers_among_an_operators_arguments_follow_the_size(
    name, dtype, wrong, tmp_path, monkeypatch
):
    source = write_many(*MANY[name], tmp_path / "base")
    asks = [[ask(length, {}), ask(2 * length + 1, {})] for length in (20, 21, 33, 37, 61)]
    plain = counting(opened((source, []), dtype, replays=False))
    expected = [warm(plain), *(answered(plain, own) for own in asks)]
    leaf = shaped._leaf
    numbers = []

    def spoilt(own, *rest):
        if not isinstance(own, Linear):
            return leaf(own, *rest)
        numbers.append(own)
        return leaf(own, *rest) + wrong

    monkeypatch.setattr(shaped, "_leaf", spoilt)
    world = counting(opened((source, []), dtype))
    assert [warm(world), *(answered(world, own) for own in asks)] == expected
    assert numbers
    assert world.runner._replays.prefill._enabled == (not wrong)


def test_nothing_is_read_that_this_step_did_not_write(llama):
    world = opened(llama)
    serve(world)
    asks = [ask(11 + 40 * i, blend) for i, blend in enumerate(BLENDS)]
    expected = answered(world, asks)
    replay, call = world.runner._replays.prefill._replay, ShapedReplay.__call__

    def poisoned(size, inputs, plan):
        replay._memory.fill_(0xFF)
        return call(replay, size, inputs, plan)

    world.runner._replays.prefill._replay = poisoned
    fresh = [ask(11 + 40 * i, blend, start=90) for i, blend in enumerate(BLENDS)]
    assert answered(world, fresh) == answered(opened(llama, replays=False), fresh)
    assert answered(world, asks) == expected


def test_longer_steps_are_proven_anew(llama, monkeypatch):
    world = opened(llama)
    warm(world)
    own = world.runner._replays.prefill
    assert own._trusted == {5, 6}
    whole = ShapedReplay.__call__

    def other_when_long(self, size, *rest):
        return whole(self, size, *rest) + (1.0 if size.tokens > 100 else 0.0)

    monkeypatch.setattr(ShapedReplay, "__call__", other_when_long)
    asks = [ask(120, BLENDS[1], start=9)]
    assert answered(world, asks) == answered(opened(llama, replays=False), asks)
    assert not own._enabled


def test_streams_wait_for_no_recording_and_no_proof(llama, monkeypatch):
    world = opened(llama)
    own = world.runner._replays.prefill
    run, seen = own.run, []

    def watched(plan, step, forward):
        before = len(own._recordings), own._replay, set(own._trusted)
        logits = run(plan, step, forward)
        after = len(own._recordings), own._replay, set(own._trusted)
        seen.append((any(row.count == 1 for row in plan.rows), before != after))
        return logits

    monkeypatch.setattr(own, "run", watched)
    for turn in range(WARM):  # the second prompt's last chunks come while the first one decodes
        world.run([ask(9, {}, start=40 + turn), ask(400, {}, start=60 + turn)])
    assert (True, False) in seen
    assert (True, True) not in seen
    assert (False, True) in seen


def test_a_replay_with_other_bits_is_never_used(llama, monkeypatch):
    whole = ShapedReplay.__call__
    monkeypatch.setattr(ShapedReplay, "__call__", lambda self, *a: whole(self, *a) + 1.0)
    world = opened(llama)
    answers = serve(world)
    assert not world.runner._replays.prefill._enabled
    assert world.runner._replays.prefill._replay is None
    assert answers == serve(opened(llama, replays=False))


@pytest.mark.parametrize("reason", ["reads a value", "no such thing"])
def test_what_cannot_be_recorded_goes_the_usual_way(llama, reason):
    world = opened(llama)
    own = world.runner._replays.prefill
    forward = own._forward

    def hindered(batch, step):
        if reason == "no such thing":
            raise RuntimeError(reason)
        torch.ones(1).sum().item()
        return forward(batch, step)

    own._forward = hindered
    answers = serve(world)
    assert not own._enabled
    assert answers == serve(opened(llama, replays=False))


def test_a_line_goes_through_three_sizes_or_there_is_none():
    def seen(of):
        return [of(*size) for size in SIZES]

    line = Linear.through(seen(lambda tokens, logits: [3, 64 * tokens, 7 + 5 * logits]))
    assert line.of(Size(100, 9)).tolist() == [3, 6400, 52]
    assert not line.fixed
    assert Linear.through(seen(lambda tokens, logits: [3, 4])).fixed
    with pytest.raises(Unrepeatable, match="not linearly"):
        Linear.through(seen(lambda tokens, logits: [tokens // 3]))
    with pytest.raises(Unrepeatable, match="other dimensions"):
        Linear.through(seen(lambda tokens, logits: np.zeros(tokens)))


def test_other_operators_at_other_sizes_are_no_replay(llama):
    world = opened(llama)
    own = world.runner._replays.prefill
    model = world.base.model
    layer = model.model.norm
    inner = layer.forward
    layer.forward = lambda x: inner(x) + 0.0 if x.shape[1] == SIZES[1].tokens else inner(x)
    try:
        warm(world)
        assert not own._enabled
    finally:
        layer.forward = inner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_of_a_mixture_are_replayed_in_chunks_with_the_bits_of_its_code(tmp_path, dtype):
    """Chunks of which no logits are wanted among them, and products that run in blocks of rows."""
    source = write_many(*MANY["qwen3-moe"], tmp_path / "base")
    asks = [[ask(length, {}, start=length)] for length in (90, 90, 70, 121, 33, 8)]

    def answers(replays: bool):
        world = opened((source, []), dtype, replays=replays)
        world.scheduler.limits = replace(world.scheduler.limits, chunk_size=32)
        return [warm(world), *(answered(world, own) for own in asks)], world

    (replayed, world), (expected, _) = answers(True), answers(False)
    assert world.runner._replays.prefill._enabled
    assert world.runner._replays.prefill._trusted >= {6}
    assert replayed == expected


def test_a_replay_is_refuted_by_what_a_chunk_without_logits_leaves_behind(llama, monkeypatch):
    """Code that is another one for many tokens, of which no logits tell."""

    def served(replays: bool):
        world = opened(llama, replays=replays)
        world.scheduler.limits = replace(world.scheduler.limits, chunk_size=64)
        last = world.base.model.model.layers[-1].input_layernorm
        inner = last.forward

        def turned(x):
            y = inner(x)
            y[:, 50:].neg_()
            return y

        last.forward = turned
        return [warm(world), answered(world, [ask(200, {}, start=9)])], world

    (replayed, world), (expected, _) = served(True), served(False)
    assert not world.runner._replays.prefill._enabled
    assert replayed == expected
