"""The merged lane: exact up to rounding, alone in its weights, and nobody else's business."""

import gc
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from fader_adapters.leases import AdapterRef
from fader_server.core import Request
from fader_server.engine import blocks as blocks_module
from fader_server.engine.limits import Limits
from fader_server.model import prefill
from tests.server.parity.test_families import (
    AUTO_FIRST,
    BOUND,
    SCALE,
    Setting,
    difference,
    prompts,
)
from tests.server.parity.test_kinds import BIAS, DORA
from tests.support.dense import DenseOracle
from tests.support.families import VOCAB, write_family
from tests.support.lanes import changes_of, merge, publish
from tests.support.oracle import Oracle
from tests.support.peft_adapters import write_adapter
from tests.support.world import Answer, Ask, TinyWorld, greedy

BLEND = {"r8": 0.7, "r16": -0.4}
BACKENDS = ["auto", "reference"]


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3"])
def exact(request, tmp_path_factory) -> Setting:
    return Setting(request.param, tmp_path_factory.mktemp(request.param), torch.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    setting = Setting("llama", tmp_path_factory.mktemp("llama"), torch.bfloat16)
    head = setting.source.parent / "head"
    write_adapter(setting.source, head, rank=4, seed=5, target_modules=["q_proj", "lm_head"])
    return setting


def _asks(blend=BLEND, count: int = 6, tokens: int = 6) -> list[Ask]:
    params = greedy(tokens, prompt_logprobs=0)
    return [Ask(prompt, blend, params) for prompt in prompts(count)]


def _check(setting: Setting, world: TinyWorld, bound: float) -> None:
    asks = _asks()
    answers = world.run(asks)
    assert all(row.lane is not None for plan in world.plans for row in plan.rows)
    assert all(plan.terms.idle for plan in world.plans), "a merged row has no delta work"
    for ask, answer in zip(asks, answers, strict=True):
        assert difference(setting.oracle, ask, answer, bound) <= bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plain_lane_equals_peft_as_the_delta_lane_does(exact: Setting, backend):
    world = exact.world(backend=backend)
    publish(world, merge(world, BLEND, form="bf16"))
    _check(exact, world, BOUND[torch.float32])


def test_a_plain_lane_equals_peft_in_bf16(llama: Setting):
    world = llama.world()
    publish(world, merge(world, BLEND, form="bf16"))
    _check(llama, world, BOUND[torch.bfloat16])


def test_a_lane_of_another_weight_would_be_noticed(exact: Setting):
    world = exact.world()
    wrong = merge(world, {"r8": 0.7, "r16": -0.5}, form="bf16")
    publish(world, wrong, stands_for=changes_of(world, BLEND).blend)
    (answer,) = world.run(_asks(count=4)[3:])
    assert difference(exact.oracle, _asks(count=4)[3], answer, 1.0) > 10 * BOUND[torch.float32]


@pytest.mark.parametrize("backend", AUTO_FIRST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_dora_and_biases_of_an_adapter_are_in_the_lane(tmp_path: Path, backend, dtype):
    source = write_family("llama", tmp_path / "base", scale=SCALE[dtype])
    settings = {"dora": DORA, "bias": BIAS}
    adapters = {
        name: write_adapter(source, tmp_path / name, rank=4, seed=i, **config)
        for i, (name, config) in enumerate(settings.items())
    }
    oracle = Oracle(source, dtype, adapters)
    for name, path in adapters.items():
        world = TinyWorld(source, dtype=dtype, backend=backend)
        world.load(name, path)
        publish(world, merge(world, {name: 1.0}, form="bf16"))
        asks = _asks({name: 1.0}, count=4)
        for ask, answer in zip(asks, world.run(asks), strict=True):
            assert difference(oracle, ask, answer, BOUND[dtype]) <= BOUND[dtype]
        assert all(row.lane is not None for plan in world.plans for row in plan.rows)


def test_a_blend_of_dora_and_a_plain_adapter_merges_as_its_mathematics_says(tmp_path: Path):
    source = write_family("gpt2", tmp_path / "base")
    settings = {"plain": {}, "dora": DORA, "dora1": {**DORA, "use_rslora": True}}
    adapters = {
        name: write_adapter(source, tmp_path / name, rank=4 + i, seed=i, **config)
        for i, (name, config) in enumerate(settings.items())
    }
    world = TinyWorld(source)
    for name, path in adapters.items():
        world.load(name, path)
    blend = {"plain": 1.0, "dora": 0.7, "dora1": -0.5}
    publish(world, merge(world, blend, form="bf16"))
    oracle = DenseOracle(source, adapters)
    (answer,) = world.run(_asks(blend, count=4)[3:])
    ask = _asks(blend, count=4)[3]
    assert difference(oracle, ask, answer, BOUND[torch.float32]) <= BOUND[torch.float32]
    other = Ask(ask.prompt, blend | {"dora": 0.6}, ask.params)
    assert difference(oracle, other, answer, 10.0) > 10 * BOUND[torch.float32]


def _others() -> list[Ask]:
    blends = [{}, {"r1": 1.0}, {"r8": 0.7, "r16": -0.41}, {"r64": -1.0}]
    return [Ask(p, blends[i % 4], greedy(8)) for i, p in enumerate(prompts(8))]


def _facts(answers: list[Answer]) -> list[object]:
    return [(a.tokens, a.logprobs, a.finish) for a in answers]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["nf4", pytest.param("bf16", marks=pytest.mark.slow)])
def test_others_are_bitwise_the_same_before_beside_and_after_a_lane(llama: Setting, form, backend):
    plain = llama.world(backend=backend).run(_others() + _asks())
    world = llama.world(backend=backend)
    assert _facts(world.run(_others() + _asks())) == _facts(plain)
    opened = publish(world, merge(world, BLEND, form=form))
    for _ in range(3):  # recorded, compared, replayed
        answers = world.run(_others() + _asks())
        assert _facts(answers[:8]) == _facts(plain[:8])
    lanes = [{row.lane for row in plan.rows} for plan in world.plans]
    assert {None, opened.lane} in lanes, "no step ran both kinds"
    merged = [a.logprobs for a in answers[8:]]
    assert merged != [a.logprobs for a in plain[8:]], "the lane was not used"
    world.scheduler.lanes.replace(None)
    assert len(opened.gone) == 1
    assert _facts(world.run(_others() + _asks())) == _facts(plain)


def test_a_merged_row_is_bitwise_the_same_alone_and_in_company(llama: Setting):
    world = llama.world()
    publish(world, merge(world, BLEND, form="nf4"))
    together = world.run(_asks() + _others())[:6]
    for ask, answer in zip(_asks(), together, strict=True):
        alone = llama.world()
        publish(alone, merge(alone, BLEND, form="nf4"))
        assert _facts(alone.run([ask])) == _facts([answer])


def test_decode_steps_of_a_lane_are_replayed_like_the_bases(llama: Setting):
    world = llama.world()
    opened = publish(world, merge(world, BLEND, form="nf4"))
    for _ in range(3):
        world.run(_asks())
    weights = world.runner._lanes[opened.lane]
    assert 6 in weights.replays.decode._trusted
    assert 6 not in world.runner._replays.decode._trusted


def _eager_steps(world: TinyWorld, monkeypatch) -> list[int]:
    """Tokens of every forward of the model's own code from now on."""
    seen: list[int] = []
    real = world.runner._forward

    def forward(batch, step, head):
        seen.append(batch.tokens)
        return real(batch, step, head)

    monkeypatch.setattr(world.runner, "_forward", forward)
    return seen


COUNTS = (6, 5, 3)


def _fresh(count: int, blend: Mapping[str, float], seed: int) -> list[Ask]:
    """Prompts that no cache knows, none of a single token."""
    g = torch.Generator().manual_seed(100 * seed + count)
    return [
        Ask(torch.randint(3, VOCAB, (20 + i,), generator=g).tolist(), blend, greedy(6))
        for i in range(count)
    ]


def _warmed(world: TinyWorld) -> TinyWorld:
    for seed in range(4):  # recorded, compared, replayed
        for count in COUNTS:
            world.run(_fresh(count, {}, seed))
    return world


@pytest.mark.parametrize("blend", [BLEND, {"head": 1.0}], ids=["inside", "head"])
@pytest.mark.parametrize("form", ["nf4", "bf16"])
def test_a_lane_takes_over_what_the_base_recorded(llama: Setting, form, blend, monkeypatch):
    heir, plain = _warmed(_with_head(llama)), _with_head(llama)
    plain.runner._replays = None
    eager = _eager_steps(heir, monkeypatch)
    for world in (heir, plain):
        publish(world, merge(world, blend, form=form))
    for count in COUNTS:
        asks = _fresh(count, blend, 9)
        assert _facts(heir.run(asks)) == _facts(plain.run(asks))
    assert [tokens for tokens in eager if tokens <= 6] == [6], "one proof for all numbers of rows"
    assert [tokens for tokens in eager if tokens > 6] == [135], "prompts wait for it"


def _with_head(llama: Setting) -> TinyWorld:
    world = llama.world()
    world.load("head", llama.source.parent / "head")
    return world


def test_a_lane_over_the_wrong_sites_is_noticed(llama: Setting, monkeypatch):
    world, plain = _warmed(llama.world()), llama.world()
    plain.runner._replays = None
    real = prefill.in_place_of

    def wrong(pairs):
        sites = real(pairs)
        addresses = list(sites)
        return sites | {addresses[0]: sites[addresses[4]]}  # a later layer's of the same shape

    monkeypatch.setattr(prefill, "in_place_of", wrong)
    lanes = [publish(w, merge(w, BLEND, form="nf4")) for w in (world, plain)]
    for seed in (7, 8, 9):
        asks = _fresh(6, BLEND, seed)
        assert _facts(world.run(asks)) == _facts(plain.run(asks))
    replays = world.runner._lanes[lanes[0].lane].replays
    assert not replays.decode.enabled
    assert not replays.prefill._trusted, "what was refuted for one kind is used for none"


def test_prefix_blocks_of_the_two_lanes_never_meet(llama: Setting, monkeypatch):
    prompt = prompts(8)[5] + prompts(8)[4]
    ask = Ask(prompt, BLEND, greedy(4))

    def cached() -> list[int]:
        world = llama.world()
        found = [world.run([ask])[0].cached]
        publish(world, merge(world, BLEND, form="nf4"))
        found += [world.run([ask])[0].cached, world.run([ask])[0].cached]
        world.scheduler.lanes.replace(None)
        return [*found, world.run([ask])[0].cached]

    assert cached() == [0, 0, 112, 112]
    monkeypatch.setattr(blocks_module, "lane_seed", lambda seed, lane: seed)
    assert cached() == [0, 112, 112, 112], "the check sees nothing"


def test_a_preempted_request_stays_in_its_lane(llama: Setting):
    asks = [Ask(ask.prompt, ask.blend, greedy(40)) for ask in _asks(count=8) + _others()]
    roomy, tight = llama.world(), llama.world(blocks=14)
    for world in (roomy, tight):
        publish(world, merge(world, BLEND, form="nf4"))
    expected = roomy.run(asks)
    answers: dict[str, Answer] = {}
    requests, release = _submit(tight, asks, answers)
    while not tight.scheduler.preemptions:
        assert tight.step(answers)
    tight.scheduler.lanes.replace(None)  # whoever runs or was sent back keeps its lane
    settled = {i for i in requests if _sequence(tight, i) and _sequence(tight, i).lane is not None}
    while tight.step(answers):
        pass
    release()
    assert settled
    for request_id, wanted in zip(requests, expected, strict=True):
        if request_id in settled:
            assert answers[request_id].tokens == wanted.tokens
    assert not tight.runner._lanes


def _sequence(world: TinyWorld, request_id: str):
    return world.scheduler._roster.open.get(request_id)


def _submit(world: TinyWorld, asks: list[Ask], answers: dict[str, Answer]):
    leases, ids = [], []
    for i, ask in enumerate(asks):
        lease = world.store.acquire([AdapterRef(n, None, g) for n, g in ask.blend.items()])
        leases.append(lease)
        request = Request(f"s{i}", tuple(ask.prompt), ask.params, lease.blend, lease.adapters)
        answers[request.id] = Answer()
        world.scheduler.add(request)
        ids.append(request.id)
    return ids, lambda: [lease.release() for lease in leases]


def test_the_weights_go_with_the_last_request_of_a_closed_lane(llama: Setting):
    world = llama.world()
    opened = publish(world, merge(world, BLEND, form="nf4"))
    base = next(iter(world.runner._lanes[opened.lane].lane.bases.values()))
    alive = weakref.ref(base)
    del base
    answers: dict[str, Answer] = {}
    ids, release = _submit(world, [*_asks(count=2), *_others()[:2]], answers)
    assert world.step(answers)
    later = publish(world, merge(world, {"r1": 1.0}, form="nf4"))
    assert not opened.gone, "requests still run in it"
    assert world.step(answers)
    assert opened.lane in world.runner._lanes
    world.scheduler.abort(ids[0])
    assert not opened.gone
    while world.step(answers):
        pass
    release()
    assert len(opened.gone) == 1
    assert set(world.runner._lanes) == {later.lane}
    assert answers[ids[1]].finish == "length"
    gc.collect()
    assert alive() is not None, "the test itself holds it"
    opened.gone.clear()
    gc.collect()
    assert alive() is None


def test_a_waiting_request_takes_the_lane_that_is_open_when_it_is_admitted(llama: Setting):
    world = llama.world(limits=Limits(max_rows=1, max_step_tokens=257, max_model_len=512))
    answers: dict[str, Answer] = {}
    ids, release = _submit(world, _asks(count=3), answers)
    assert world.step(answers)
    opened = publish(world, merge(world, BLEND, form="nf4"))
    while world.step(answers):
        pass
    release()
    lanes = {row.sequence.request.id: row.lane for plan in world.plans for row in plan.rows}
    assert [lanes[i] for i in ids] == [None, opened.lane, opened.lane]


def test_a_lane_of_another_form_is_another_key(llama: Setting, tmp_path: Path):
    world = llama.world()
    keys = [
        merge(world, BLEND, form="nf4", rounding="plain").spec.key,
        merge(world, BLEND, form="nf4", rounding="keep").spec.key,
        merge(world, BLEND, form="bf16", rounding="keep").spec.key,
        merge(world, {"r8": 0.7}, form="bf16", rounding="keep").spec.key,
    ]
    assert len(set(keys)) == 4
    assert merge(world, BLEND, form="bf16", rounding="plain").spec.key == keys[2]
