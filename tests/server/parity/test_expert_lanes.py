"""Merged lanes of blends that adapt experts and routers."""

from pathlib import Path

import pytest
import torch

from fader_server.model.fidelity import measure
from fader_server.model.probe import ProbeModel
from fader_server.model.views import BaseView, BlendView, LaneView
from tests.server.parity.test_expert_adapters import BY_NAME, BY_PARAMETER, opened
from tests.server.parity.test_families import BOUND, check, difference, prompts
from tests.support.lanes import changes_of, merge, publish, weights_hash
from tests.support.world import Answer, Ask, greedy

BLEND = {"r8": 0.7, "r16": -0.4}
QUICK = frozenset({"gpt-oss"})
FAMILIES = [
    pytest.param(family, marks=[] if family in QUICK else pytest.mark.slow)
    for family in (*BY_NAME, *BY_PARAMETER)
]


def bits(answers: list[Answer]) -> list[object]:
    assert not any(answer.error for answer in answers)
    return [(a.tokens, a.logprobs, a.prompt_logprobs) for a in answers]


def asks(*blends: dict[str, float]) -> list[Ask]:
    return [
        Ask(prompt, blends[i % len(blends)], greedy(6, prompt_logprobs=0))
        for i, prompt in enumerate(prompts(6))
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lane_equals_peft_and_what_the_probe_sees_of_it(family: str, tmp_path: Path):
    world, oracle = opened(family, tmp_path)
    before = weights_hash(world.base.installed)
    lane = merge(world, BLEND, form="bf16")
    assert {loss.path for loss in lane.losses} >= {
        item.path for item in world.base.installed.spec.linears if item.role == "experts"
    }
    publish(world, lane)
    mixed = asks(BLEND)
    answers = world.run(mixed)
    check(oracle, mixed, answers, BOUND[torch.float32])
    assert all(row.lane is not None for plan in world.plans for row in plan.rows)
    other = Ask(mixed[1].prompt, {"r8": 0.5, "r16": -0.4}, mixed[1].params)
    assert difference(oracle, other, answers[1], 1.0) > 10 * BOUND[torch.float32]

    changes, tokens = changes_of(world, BLEND), prompts(6)[5]
    probe = ProbeModel(world.base, lambda: None)
    views = [BlendView(changes, probe.device), LaneView(lane), BaseView()]
    wanted = [oracle.logits(tokens, blend) for blend in (BLEND, BLEND, {})]
    chunks = zip(*probe.logits(tokens, views), strict=True)
    for given, expected in zip(map(torch.cat, chunks), wanted, strict=True):
        assert float((given - expected).abs().max()) < BOUND[torch.float32]
    assert float((wanted[0] - wanted[2]).abs().max()) > 10 * BOUND[torch.float32]
    loss = measure(probe, tokens, changes, lane)
    half = merge(world, {name: weight / 2 for name, weight in BLEND.items()}, form="bf16")
    assert loss.kl < measure(probe, tokens, changes, half).kl / 10
    assert weights_hash(world.base.installed) == before


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16]
)
def test_others_are_bitwise_the_same_beside_a_lane(dtype: torch.dtype, tmp_path: Path):
    world, _ = opened("qwen3-moe", tmp_path, dtype=dtype)
    mixed = asks({}, {"r8": 1.0}, BLEND)
    plain = bits(world.run(mixed))
    lane = publish(world, merge(world, BLEND, form="nf4"))
    world.plans.clear()
    for _ in range(3):  # recorded, compared, replayed
        beside = bits(world.run(mixed))
        for i, (one, other) in enumerate(zip(plain, beside, strict=True)):
            assert (one == other) == (mixed[i].blend != BLEND)
    assert {None, lane.lane} in [{row.lane for row in plan.rows} for plan in world.plans]
    world.scheduler.lanes.replace(None)
    assert bits(world.run(mixed)) == plain
