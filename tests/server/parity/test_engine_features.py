"""Chunks, prefix hits, preemption and company change nothing: answers stay those of PEFT."""

import random
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import pytest
import torch

from fader_server.core import SamplingParams
from fader_server.engine.limits import Limits
from tests.server.parity.test_families import BOUND, Setting, check, mixed, prompts
from tests.support.world import Ask, TinyWorld, greedy

FP32 = BOUND[torch.float32]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting("llama", tmp_path_factory.mktemp("llama"), torch.float32)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting("gemma3", tmp_path_factory.mktemp("gemma3"), torch.float32)


def _small_chunks() -> Limits:
    return Limits(max_rows=16, max_step_tokens=48, chunk_size=16, max_model_len=512)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_chunked_prefill_beside_decode_equals_peft(name, request):
    setting: Setting = request.getfixturevalue(name)
    world = setting.world(limits=_small_chunks())
    asks = mixed()
    check(setting.oracle, asks, world.run(asks), FP32)
    shared = [p for p in world.plans if {r.count == 1 for r in p.rows} == {True, False}]
    assert shared, "no step held a chunk and a decode row"


def test_prefix_hits_equal_peft_and_never_cross_blends(llama: Setting):
    world = llama.world()
    prompt = prompts(8)[5] + prompts(8)[4]  # 114 tokens: seven full blocks
    params = greedy(5)
    first = [Ask(prompt, blend, params) for blend in ({}, {"r8": 1.0}, {"r8": 0.5})]
    for ask in first:
        (answer,) = world.run([ask])
        assert answer.cached == 0, "a block of one blend was found under another"
    again = [Ask([*prompt[:100], 7, 8, 9], ask.blend, params) for ask in first] + first
    answers = world.run(again)
    assert [a.cached for a in answers] == [96, 96, 96, 112, 112, 112]
    for ask, answer in zip(again, answers, strict=True):
        logprobs = torch.log_softmax(
            llama.oracle.logits([*ask.prompt, *answer.tokens][:-1], ask.blend), dim=-1
        )[len(ask.prompt) - 1 :]
        told = torch.tensor([item.logprob for item in answer.logprobs])
        expected = logprobs[torch.arange(len(told)), answer.tokens]
        torch.testing.assert_close(told, expected, rtol=0, atol=FP32)


def test_a_reload_under_one_name_never_meets_the_old_cache(llama: Setting):
    world = llama.world()
    ask = Ask(prompts(8)[5], {"swap": 1.0}, greedy(5))
    world.load("swap", llama.adapters["r16"])
    (before,) = world.run([ask])
    world.load("swap", llama.adapters["r64"])
    (after,) = world.run([ask])
    world.load("swap", llama.adapters["r16"])
    (back,) = world.run([ask])
    fresh = llama.world()
    fresh.load("swap", llama.adapters["r64"])
    assert fresh.run([ask])[0].logprobs == after.logprobs
    assert back.tokens == before.tokens
    assert after.logprobs != before.logprobs
    assert after.cached == 0


def test_preemption_by_recompute_equals_an_engine_with_room(llama: Setting):
    asks = [Ask(ask.prompt, ask.blend, greedy(40)) for ask in mixed(8)]
    roomy, tight = llama.world(), llama.world(blocks=12)
    expected = roomy.run(asks)
    answers = tight.run(asks)
    assert tight.scheduler.preemptions > 0
    assert roomy.scheduler.preemptions == 0
    assert [a.tokens for a in answers] == [a.tokens for a in expected]


def _company(setting: Setting, seed: int, needle: Ask) -> tuple[list[Ask], int]:
    rng = random.Random(seed)
    others = [
        Ask(prompt, rng.choice(BLENDS), rng.choice([greedy(rng.randint(1, 12)), _sampled(seed)]))
        for prompt in prompts(15)
    ]
    place = rng.randrange(16)
    return [*others[:place], needle, *others[place:]], place


BLENDS: list[Mapping[str, float]] = [{}, {"r1": 1.0}, {"r64": -1.0}, {"r8": 0.3, "r16": 0.3}]


def _sampled(seed: int) -> SamplingParams:
    return SamplingParams(temperature=1.0, top_p=0.9, seed=seed, max_tokens=8, logprobs=0)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARAMS = {"greedy": greedy(10), "sampled": _sampled(11)}
SETTINGS = product(("auto", "reference"), DTYPES, PARAMS)
QUICK = {("auto", "bf16", "sampled")}


@pytest.mark.parametrize(
    ("backend", "dtype", "params"),
    [
        pytest.param(
            *(backend, DTYPES[dtype], PARAMS[params]),
            id=f"{backend}-{dtype}-{params}",
            marks=[] if (backend, dtype, params) in QUICK else pytest.mark.slow,
        )
        for backend, dtype, params in SETTINGS
    ],
)
def test_a_request_is_bitwise_the_same_alone_and_in_twenty_random_batches(
    llama: Setting, params, dtype, backend
):
    needle = Ask(prompts(8)[4], {"r8": 0.7, "r16": -0.4}, params)

    def world() -> TinyWorld:
        world = TinyWorld(llama.source, dtype=dtype, backend=backend, limits=_small_chunks())
        for name, path in llama.adapters.items():
            world.load(name, path)
        return world

    (alone,) = world().run([needle])
    assert len(alone.tokens) == params.max_tokens or alone.finish == "stop"
    for seed in range(20):
        asks, place = _company(llama, seed, needle)
        answer = world().run(asks)[place]
        assert answer.tokens == alone.tokens, f"seed {seed}"
        assert answer.logprobs == alone.logprobs, f"seed {seed}"
    changed = Ask(needle.prompt, {"r8": 0.7, "r16": -0.45}, params)
    assert world().run([changed])[0].logprobs != alone.logprobs, "the comparison sees nothing"


def test_half_and_half_of_one_adapter_is_the_adapter(llama: Setting, tmp_path: Path):
    world = llama.world()
    twin = tmp_path / "twin"
    twin.mkdir()
    config = (llama.adapters["r8"] / "adapter_config.json").read_bytes()
    (twin / "adapter_config.json").write_bytes(config)
    weights = (llama.adapters["r8"] / "adapter_model.safetensors").read_bytes()
    (twin / "adapter_model.safetensors").write_bytes(_padded_header(weights))
    world.load("twin", twin)
    prompt = prompts(4)[3]
    whole, halves = world.run([Ask(prompt, {"r8": 1.0}), Ask(prompt, {"r8": 0.5, "twin": 0.5})])
    assert whole.tokens == halves.tokens
    for one, other in zip(whole.logprobs, halves.logprobs, strict=True):
        assert abs(one.logprob - other.logprob) < FP32


def _padded_header(weights: bytes) -> bytes:
    """The same tensors in other bytes: another version of equal weights."""
    size = int.from_bytes(weights[:8], "little")
    header = weights[8 : 8 + size].rstrip() + b" " * 64
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + weights[8 + size :]
