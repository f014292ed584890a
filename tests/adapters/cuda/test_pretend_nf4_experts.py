"""A mixture whose experts are in NF4 on the pretended device: the reference's answers through its
graphs, nothing of the routing read by the host, and a lane in NF4 beside streams."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from transformers import PreTrainedModel, Qwen3MoeConfig

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_adapters.kernels.cuda.backend import CudaBackend
from fader_adapters.kernels.cuda.nf4_experts import CudaNf4Stack
from fader_adapters.kernels.nf4_stack import Nf4Stack
from fader_adapters.lane import MergedLane
from fader_server.model import graphs, loader
from tests.adapters.cuda.test_pretend_experts import ADAPTERS, asks
from tests.support.lanes import merge, publish
from tests.support.pretend_cuda import PretendDevice, unavailable
from tests.support.pretend_cuda.setting import SMALL, Setting, check, on_device, opened
from tests.support.pretend_cuda.world import LIMITS, PretendWorld
from tests.support.world import TinyWorld

pytestmark = [
    pytest.mark.skipif(bool(unavailable()), reason=unavailable()),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    config = Qwen3MoeConfig(**SMALL | mixture | {"norm_topk_prob": True, "head_dim": 32})
    read: Callable[..., PreTrainedModel] = loader.read_nf4

    def packed(*args: Any, **given: Any) -> PreTrainedModel:
        return read(*args, **given | {"quantize_experts": True})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "read_nf4", packed)
        yield Setting(tmp_path_factory.mktemp("mixture"), config, ADAPTERS)


@pytest.fixture(scope="module")
def device(setting: Setting) -> Iterator[PretendDevice]:
    with on_device() as found:
        yield found


@pytest.fixture(scope="module")
def world(setting: Setting, device: PretendDevice) -> PretendWorld:
    found = opened(setting)
    for under, form in ((found, CudaNf4Stack), (setting.reference, Nf4Stack)):
        stacks = [s for s in under.base.installed.stacks.values() if s.spec.role == "experts"]
        assert [type(stack.weight) for stack in stacks] == [form] * 2
    replays = found.runner._replays
    assert isinstance(replays, graphs.DecodeGraphs)
    assert replays.prompts is not None
    return found


def test_mixed_batches_of_blends_give_the_references_answers_and_wait_for_nothing(
    setting: Setting, world: PretendWorld, device: PretendDevice
) -> None:
    waits: list[set[str]] = []
    turn = world.stepper.turn

    def counted() -> bool:
        before, replays = device.waits.copy(), device.replays
        found = turn()
        if device.replays > replays:
            waits.append(set(device.waits - before))
        return found

    world.stepper.turn = counted  # pyright: ignore[reportAttributeAccessIssue]
    blends = ({}, {"all": 1.0}, {"experts": 0.5, "plain": 1.0}, {"all": 0.7, "experts": -0.4})
    check(setting, world, asks(*blends))
    world.stepper.turn = turn
    assert {"nf4_experts", "expert_shrink", "expert_expand"} <= device.kernels
    assert len(waits) >= 3
    assert set().union(*waits) == {"event"}


def test_experts_that_the_host_looks_at_cannot_be_captured(
    setting: Setting, device: PretendDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaBackend, "pack_stack", lambda self, weight: weight)
    assert not isinstance(opened(setting).runner._replays, graphs.DecodeGraphs)


def test_a_wrong_expert_is_noticed(
    setting: Setting, world: PretendWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks = [s for s in world.base.installed.stacks.values() if s.spec.role == "experts"]
    codes = [stack.weight.tiles.codes for stack in stacks if isinstance(stack.weight, CudaNf4Stack)]
    kept = [held.clone() for held in codes]
    for held in codes:
        held.copy_(held.flip(0))
    with pytest.raises(AssertionError):
        check(setting, world, asks({}, {"all": 1.0}, start=30))
    for held, before in zip(codes, kept, strict=True):
        held.copy_(before)
    check(setting, world, asks({}, {"all": 1.0}, start=60))


def test_a_lane_in_nf4_beside_streams(setting: Setting, world: PretendWorld) -> None:
    blend = {"all": 0.7, "experts": -0.4}

    def lane(under: TinyWorld) -> MergedLane:
        made = merge(under, blend, form="nf4")
        publish(under, made)
        return made

    reference = TinyWorld(setting.source, limits=LIMITS, blocks=40, backend="reference")
    setting.load(reference)
    wanted, made = lane(reference), lane(world)
    forms = {type(w) for under in (wanted, made) for w in under.weights.stacks.values()}
    assert {CudaNf4Stack, Nf4Stack} <= forms
    mixed = asks(blend, {"all": 1.0}, {}, start=90)
    before = len(world.plans)
    got, want = world.run(mixed), reference.run(mixed)
    assert [answer.tokens for answer in got] == [answer.tokens for answer in want]
    for ours, theirs in zip(got, want, strict=True):
        told = [entry.logprob for entry in theirs.logprobs]
        assert [entry.logprob for entry in ours.logprobs] == pytest.approx(told, abs=1e-4)
    assert any(row.lane is not None for plan in world.plans[before:] for row in plan.rows)
