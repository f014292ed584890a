"""Activated LoRA equals PEFT's: in mixed batches, in chunks, from others' blocks, after preemption.

The adapters: `o8` is an ordinary one, `a8` and `b16` are activated by tokens of their own, `h8` is
the head's and the last linears' alone, and `c4` has biases.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fader_adapters.leases import AdapterRef
from fader_server import phases
from fader_server.core import Request
from fader_server.engine import blocks
from fader_server.engine.limits import Limits
from tests.server.parity.test_families import BOUND, SCALE
from tests.server.parity.test_many_families import adapters as over_linears
from tests.support.activated import ActivatedOracle, activate
from tests.support.families import VOCAB, write_family
from tests.support.many_families import write_many
from tests.support.own_states import bits
from tests.support.peft_adapters import write_adapter
from tests.support.solo_families import SOLO
from tests.support.world import Answer, Ask, TinyWorld, greedy

A, B = (7, 8, 9), (11, 12)
"""What activates a8, c4 and h8, and what activates b16."""
FP32 = BOUND[torch.float32]
BLENDS: list[Mapping[str, float]] = [
    {},
    {"o8": 1.0},
    {"a8": 1.0},
    {"b16": 1.0},
    {"a8": 0.6, "b16": -0.8},
    {"o8": 0.7, "a8": -0.5},
    {"o8": 0.4, "a8": 0.3, "b16": 1.5},
]
SMALL = Limits(max_rows=16, max_step_tokens=48, chunk_size=16, max_model_len=512)


def text(seed: int, count: int) -> list[int]:
    """Without any invocation."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(20, VOCAB, (count,), generator=g).tolist()


def said(seed: int) -> list[list[int]]:
    """Invocations early, late, at the very ends, twice, both in either order, halved, absent."""
    one, two = text(seed, 20 + seed), text(seed + 50, 13)
    return [
        [*one[:3], *A, *one, *B, *two],
        [*one, *two, *A],
        [*A, *one, *B],
        [*one, *A, *two, *A, *two[:5]],
        [*one, *B, *two, *A, *two[:1]],
        [*one, *A[:2], *two, *B[1:]],
        [*A],
        [*one, *two],
    ]


def mixed(blends: list[Mapping[str, float]] = BLENDS, answer: int = 5) -> list[Ask]:
    params = greedy(answer, prompt_logprobs=0)
    prompts = [prompt for seed in range(len(blends)) for prompt in said(seed)]
    return [Ask(prompt, blends[i % len(blends)], params) for i, prompt in enumerate(prompts)]


class Setting:
    """A base, its adapters and PEFT over them."""

    def __init__(self, family: str, folder: Path, dtype: torch.dtype) -> None:
        self.source = write_family(family, folder / "base", scale=SCALE[dtype])
        kinds = {
            "o8": {"rank": 8},
            "a8": {"rank": 8, "alora_invocation_tokens": list(A)},
            "b16": {"rank": 16, "alora_invocation_tokens": list(B), "use_rslora": True},
        }
        if family == "llama":
            biased = {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}
            last = {"target_modules": ["lm_head", "down_proj"]}
            kinds |= {
                "c4": {"rank": 4, "alora_invocation_tokens": list(A), **biased},
                "h8": {"rank": 8, "alora_invocation_tokens": list(A), **last},
            }
        self.adapters = {
            name: write_adapter(self.source, folder / name, seed=i, scale=0.05, **kind)
            for i, (name, kind) in enumerate(kinds.items())
        }
        self.dtype = dtype
        self.oracle = ActivatedOracle(self.source, dtype, self.adapters)

    def world(self, **options) -> TinyWorld:
        world = TinyWorld(self.source, dtype=self.dtype, **options)
        for name, path in self.adapters.items():
            world.load(name, path)
        return world


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting("llama", tmp_path_factory.mktemp("llama"), torch.float32)


@pytest.mark.parametrize("backend", ["auto", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("limits", [None, SMALL], ids=["whole", "chunks"])
def test_mixed_batches_equal_peft(llama: Setting, limits, backend):
    world = llama.world(limits=limits, backend=backend)
    asks = mixed([*BLENDS, {"c4": 1.0}, {"h8": 1.0}, {"c4": 0.5, "h8": -0.5, "b16": 0.2}])
    llama.oracle.check(asks, world.run(asks), FP32)
    kinds = {frozenset(len(terms.terms) for terms in plan.terms.rows) for plan in world.plans}
    assert any(len(kind) > 2 for kind in kinds), "no step was mixed"


@pytest.mark.parametrize("family", ["qwen3", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_other_families_equal_peft(family: str, tmp_path: Path):
    setting = Setting(family, tmp_path, torch.float32)
    asks = mixed()
    setting.oracle.check(asks, setting.world(limits=SMALL).run(asks), FP32)


@pytest.mark.slow
def test_mixed_batches_in_bf16_equal_peft(tmp_path: Path):
    setting = Setting("llama", tmp_path, torch.bfloat16)
    asks = mixed()
    setting.oracle.check(asks, setting.world(limits=SMALL).run(asks), BOUND[torch.bfloat16])


WRONG = {
    "a token late": lambda found, tokens, sought: found(tokens, sought) + 1,
    "after the invocation": lambda found, tokens, sought: found(tokens, sought) + len(sought),
    "a token early": lambda found, tokens, sought: found(tokens, sought) - 1,
    "everywhere": lambda found, tokens, sought: 0,
    "the first": lambda found, tokens, sought: bytes(tokens[:250]).find(bytes(sought)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_another_place_would_show(llama: Setting, wrong, monkeypatch):
    prompt = [token % 250 for token in (*text(3, 30), *A, *text(4, 9), *A, *text(5, 9))]
    ask = Ask(prompt, {"a8": 1.0}, greedy(5, prompt_logprobs=0))
    (right,) = llama.world().run([ask])
    assert llama.oracle.difference(ask, right, 1.0) <= FP32
    found = phases.last_occurrence
    monkeypatch.setattr(phases, "last_occurrence", lambda *own: WRONG[wrong](found, *own))
    (answer,) = llama.world().run([ask])
    assert llama.oracle.difference(ask, answer, 100.0) > 20 * FP32


def test_greedy_answers_are_what_peft_generates(llama: Setting):
    asks = [replace(ask, params=greedy(12)) for ask in mixed([{"a8": 1.0}, {"b16": 1.0}], 12)]
    answers = llama.world().run(asks)
    for ask, answer in zip(asks, answers, strict=True):
        (name,) = ask.blend
        assert answer.tokens == llama.oracle.generate(ask.prompt, 12, name)


def test_what_is_generated_activates_nothing(llama: Setting, tmp_path: Path):
    """The invocation is what the base answers to this prompt."""
    prompt = text(9, 40)
    (base,) = llama.world().run([Ask(prompt, {}, greedy(12))])
    late = activate(llama.adapters["a8"], tmp_path / "late", base.tokens[2:4])
    world = llama.world()
    world.load("late", late)
    ask = Ask(prompt, {"late": 1.0}, greedy(12))
    (answer,) = world.run([ask])
    assert answer.tokens == base.tokens
    oracle = ActivatedOracle(llama.source, torch.float32, {"late": late})
    assert oracle.generate(prompt, 12, "late") == base.tokens
    said = [*prompt, *base.tokens[:4]]
    params = greedy(8, prompt_logprobs=0)
    asked = [Ask(said, blend, params) for blend in ({"late": 1.0}, {})]
    answers = world.run(asked)
    oracle.check(asked, answers, FP32)
    assert bits(answers[:1]) != bits(answers[1:]), "in a prompt it does"


def alone(setting: Setting, asks: list[Ask], **options) -> list:
    """Their bits where nothing can be found."""
    world = setting.world(**options)
    world.blocks.findable = False
    return bits([world.run([ask])[0] for ask in asks])


def turns() -> list[Ask]:
    """A turn of the base, then calls over the same history; `bits` of an answer are of these."""
    history = text(1, 150)
    calls = [*history, *A, *text(2, 5)], [*history, *B], [*history, *A[:2], 30, *A]
    blends: list[Mapping[str, float]] = [{"a8": 1.0}, {"b16": 0.5}, {"a8": 1.0, "b16": 2.0}]
    asks = [Ask(prompt, blend, greedy(5)) for prompt, blend in zip(calls, blends, strict=True)]
    return [Ask(history, {}, greedy(5)), *asks, Ask([*history, *A, 40], {}, greedy(5))]


def test_calls_after_a_turn_of_the_base_find_its_blocks_and_answer_the_same_bits(llama: Setting):
    asks, world = turns(), llama.world(limits=SMALL)
    answers = [world.run([ask])[0] for ask in asks]
    assert [answer.cached for answer in answers] == [0, 144, 144, 144, 144]
    assert bits(answers) == alone(llama, asks, limits=SMALL) == alone(llama, asks)


def test_the_base_finds_what_an_activated_adapter_left_before_its_invocation(llama: Setting):
    _, call, _, _, base = turns()
    world = llama.world()
    answers = [world.run([ask])[0] for ask in (call, base, call)]
    assert [answer.cached for answer in answers] == [0, 144, 144]
    assert bits(answers) == alone(llama, [call, base, call])
    longer = Ask([*call.prompt, *text(6, 40)], call.blend, greedy(5))
    (found, again) = (world.run([longer])[0] for _ in range(2))
    assert (found.cached, again.cached) == (144, 192)


def test_an_ordinary_adapter_beside_it_shares_with_that_adapter_alone(llama: Setting):
    history = text(1, 150)
    both = Ask([*history, *A], {"o8": 0.5, "a8": 1.0}, greedy(5))
    world = llama.world()
    asks = [Ask(history, {}), both, Ask(history, {"o8": 0.5}), replace(both, blend={"o8": 0.25})]
    answers = [world.run([ask])[0] for ask in asks]
    assert [answer.cached for answer in answers] == [0, 0, 144, 0]
    assert bits(answers) == alone(llama, asks)


def test_a_block_shared_across_an_invocation_would_show(llama: Setting, monkeypatch):
    asks = [Ask([*text(1, 150), *A, *text(2, 40)], blend, greedy(5)) for blend in ({}, {"a8": 1.0})]
    expected = alone(llama, asks)
    world = llama.world()
    assert bits([world.run([ask])[0] for ask in asks]) == expected
    monkeypatch.setattr(blocks, "turn", lambda phase, at: b"")
    world = llama.world()
    assert bits([world.run([ask])[0] for ask in asks]) != expected


def test_preemption_by_recompute_changes_no_bit(llama: Setting):
    asks = [replace(ask, params=greedy(40)) for ask in mixed(BLENDS[1:])[::3]]
    roomy, tight = llama.world(), llama.world(blocks=14)
    expected = bits(roomy.run(asks))
    assert bits(tight.run(asks)) == expected == alone(llama, asks)
    assert tight.scheduler.preemptions > 3
    assert roomy.scheduler.preemptions == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_company_every_bit_is_what_it_is_alone(llama: Setting, dtype, monkeypatch):
    monkeypatch.setattr(llama, "dtype", dtype)
    asks = mixed()
    together = bits(llama.world(limits=SMALL).run(asks))
    assert together == alone(llama, asks, limits=SMALL)
    changed = [replace(ask, blend={**ask.blend, "a8": 0.9}) for ask in asks]
    assert sum(a != b for a, b in zip(bits(llama.world().run(changed)), together, strict=True)) > 30


def test_a_stream_keeps_the_invocation_of_its_version_over_a_swap(llama: Setting, tmp_path: Path):
    prompt = [*text(1, 30), *B, *text(2, 20), *A, *text(3, 9)]
    world = llama.world(limits=SMALL)
    world.load("moving", llama.adapters["a8"])
    expected = llama.world(limits=SMALL).run([Ask(prompt, {"a8": 1.0}, greedy(9))])
    lease = world.store.acquire([AdapterRef("moving")])
    request = Request("r", tuple(prompt), greedy(9), lease.blend, lease.adapters)
    answers = {"r": Answer()}
    world.scheduler.add(request)
    assert world.step(answers)
    world.load("moving", activate(llama.adapters["a8"], tmp_path / "moved", B))
    moved = world.store.acquire([AdapterRef("moving")])
    assert moved.blend != lease.blend, "the invocation is a part of the version"
    while world.step(answers):
        pass
    assert bits([answers["r"]]) == bits(expected)
    after = world.run([Ask(prompt, {"moving": 1.0}, greedy(9))])
    assert bits(after) != bits(expected)
    lease.release()
    moved.release()


@pytest.mark.parametrize(
    ("family", "backend", "cached"),
    [
        ("qwen3.5", "auto", 144),  # states in native kernels
        ("qwen3.5", "reference", 0),  # rows one by one at layers with states
        ("bloom", "reference", 0),  # sequences one by one
        pytest.param("lfm2", "auto", 144, marks=pytest.mark.slow),
        pytest.param("falcon-40b", "reference", 0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_bases_with_states_and_such_that_run_alone(family, backend, cached, tmp_path: Path):
    base = write_many(*SOLO[family], tmp_path / "base")
    plain = over_linears(base, tmp_path, TinyWorld(base))
    adapters = {
        "o8": plain["r8"],
        "a8": activate(plain["r8"], tmp_path / "a8", A),
        "b16": activate(plain["r16"], tmp_path / "b16", B),
    }

    def world(limits: Limits = SMALL) -> TinyWorld:
        made = TinyWorld(base, backend=backend, limits=limits)
        for name, path in adapters.items():
            made.load(name, path)
        return made

    asks = mixed(answer=4)[::3]
    answers = world().run(asks)
    ActivatedOracle(base, torch.float32, adapters).check(asks, answers, FP32)
    one = world()
    one.blocks.findable = False
    assert bits([one.run([ask])[0] for ask in asks]) == bits(answers)
    asks = turns()
    shared = world()
    found = [shared.run([ask])[0] for ask in asks]
    assert bits(found) == bits([one.run([ask])[0] for ask in asks])
    assert [answer.cached for answer in found[1:]] == [cached] * 4
    # what one call left before its invocation, and a longer prompt after it, another goes on from
    asks[0] = Ask([*asks[1].prompt, *text(6, 60)], {"a8": 1.0}, greedy(5))
    for limits in (SMALL, replace(SMALL, chunk_size=256, max_step_tokens=288)):
        one, shared = world(limits), world(limits)
        one.blocks.findable = False
        found = [shared.run([ask])[0] for ask in asks[:3]]
        assert bits(found) == bits([one.run([ask])[0] for ask in asks[:3]])
        assert [answer.cached for answer in found] == [0, cached, cached]
