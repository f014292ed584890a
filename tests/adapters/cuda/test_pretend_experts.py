"""A mixture with adapters of its experts and router on the pretended device: the reference's
answers through graphs of the kinds that its steps need, and a lane beside them."""

from collections.abc import Iterator, Mapping

import pytest
from transformers import Qwen3MoeConfig

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_adapters.kernels.cuda.sites import CudaStack
from fader_adapters.lane import MergedLane
from fader_server.model import graph_kinds, graphs, prompt_graphs
from fader_server.model.fidelity import measure
from fader_server.model.probe import ProbeModel
from tests.support.lanes import changes_of, merge, publish
from tests.support.pretend_cuda import PretendDevice, unavailable
from tests.support.pretend_cuda.setting import SMALL, Setting, check, on_device, opened
from tests.support.pretend_cuda.world import LIMITS, PretendWorld
from tests.support.world import Ask, TinyWorld, greedy

pytestmark = [
    pytest.mark.skipif(bool(unavailable()), reason=unavailable()),
    pytest.mark.slow,
]

EXPERTS = "model.layers.0.mlp.experts"
ADAPTERS: dict[str, dict] = {
    "all": {
        "rank": 8,
        "target_modules": ["o_proj"],
        "target_parameters": [
            f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj", "model.layers.0.mlp.gate.weight"
        ],
    },
    "experts": {
        "rank": 20, "target_modules": [], "target_parameters": [f"{EXPERTS}.down_proj"]
    },
    "plain": {"rank": 4, "target_modules": ["q_proj", "o_proj"]},
    "dora": {"rank": 4, "use_dora": True, "target_modules": ["o_proj"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    config = Qwen3MoeConfig(**SMALL | mixture | {"norm_topk_prob": True, "head_dim": 32})
    return Setting(tmp_path_factory.mktemp("mixture"), config, ADAPTERS)


@pytest.fixture(scope="module")
def device(setting: Setting) -> Iterator[PretendDevice]:
    with on_device() as found:
        yield found


@pytest.fixture(scope="module")
def world(setting: Setting, device: PretendDevice) -> PretendWorld:
    found = opened(setting)
    roles = {stack.spec.role for stack in found.base.installed.stacks.values()}
    assert roles == {"experts", "router"}
    replays = found.runner._replays
    assert isinstance(replays, graphs.DecodeGraphs)
    assert replays.prompts is not None
    every = set(graph_kinds.every_kind(stacks=True))
    assert {kind for _, kind in replays.captured} == every
    assert {kind for _, kind in replays.prompts.captured} == every
    return found


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the steps that a test ran through graphs."""
    found: list[str] = []

    def noted(step) -> graph_kinds.Kind:
        found.append(graph_kinds.kind_of(step))
        return graph_kinds.kind_of(step)

    for module in (graphs, prompt_graphs):
        monkeypatch.setattr(module, "kind_of", noted)
    return found


def asks(*blends: Mapping[str, float], start: int = 5, count: int = 3) -> list[Ask]:
    lengths = (3, 18, 7, 5)
    return [
        Ask(list(range(start + i, start + i + lengths[i])), blend, greedy(count))
        for i, blend in enumerate(blends)
    ]


def test_mixed_batches_of_blends_give_the_references_answers(
    setting: Setting, world: PretendWorld, device: PretendDevice, ran: list[str]
) -> None:
    before = device.replays
    blends = ({}, {"all": 1.0}, {"experts": 0.5, "plain": 1.0}, {"all": 0.7, "experts": -0.4})
    check(setting, world, asks(*blends))
    assert device.replays > before
    assert {"expert_shrink", "expert_expand"} <= device.kernels
    assert "experts" in ran
    check(setting, world, asks({"all": 1.0, "dora": 0.5}, start=40))
    assert "experts and vectors" in ran, ran


def test_steps_whose_adapters_change_no_experts_do_not_pay_for_them(
    setting: Setting, world: PretendWorld, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(setting, world, asks({}, {"plain": 1.0}, {"dora": 0.5}, start=60))
    check(setting, world, asks({}, {}, start=70))
    assert {"base", "deltas", "vectors"} >= set(ran) >= {"base", "vectors"}


def test_a_launch_that_adds_nothing_is_noticed(
    setting: Setting, device: PretendDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaStack, "__call__", lambda self, y, x, routing, step: y)
    other = opened(setting)
    with pytest.raises(AssertionError):
        check(setting, other, asks({}, {"all": 1.0}))


def test_a_decode_step_waits_for_its_own_copy_alone(
    world: PretendWorld, device: PretendDevice
) -> None:
    waits: list[set[str]] = []
    turn = world.stepper.turn

    def counted() -> bool:
        before, replays = device.waits.copy(), device.replays
        found = turn()
        if device.replays > replays:
            waits.append(set(device.waits - before))
        return found

    led = world.led
    world.stepper.turn = counted  # pyright: ignore[reportAttributeAccessIssue]
    world.run(asks({}, {"all": 1.0}, {"experts": 0.5}, count=6))
    world.stepper.turn = turn
    assert len(waits) >= 3
    assert world.led > led, "steps begin before the one in front has ended"
    assert set().union(*waits) == {"event"}


def test_a_lane_beside_streams(setting: Setting, world: PretendWorld) -> None:
    blend = {"all": 0.7, "experts": -0.4}

    def lane(under: TinyWorld) -> MergedLane:
        made = merge(under, blend, form="bf16")
        publish(under, made)
        return made

    reference = TinyWorld(setting.source, limits=LIMITS, blocks=40, backend="reference")
    setting.load(reference)
    wanted, made = lane(reference), lane(world)
    tokens = list(range(5, 25))
    measured = [
        measure(ProbeModel(under.base, lambda: None), tokens, changes_of(under, blend), own).kl
        for under, own in ((reference, wanted), (world, made))
    ]
    assert measured[1] == pytest.approx(measured[0], abs=1e-6)
    mixed = asks(blend, {"all": 1.0}, {}, start=90)
    before = len(world.plans)
    got, want = world.run(mixed), reference.run(mixed)
    assert [answer.tokens for answer in got] == [answer.tokens for answer in want]
    for ours, theirs in zip(got, want, strict=True):
        told = [entry.logprob for entry in theirs.logprobs]
        assert [entry.logprob for entry in ours.logprobs] == pytest.approx(told, abs=1e-4)
    assert any(row.lane is not None for plan in world.plans[before:] for row in plan.rows)
