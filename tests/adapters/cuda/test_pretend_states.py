"""Hybrids on the pretended device: the reference's answers through captured steps that take states
from slot to slot, in any company, after a prefix that was kept and after a step that failed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import NemotronHConfig, PretrainedConfig, Qwen3_5TextConfig

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_adapters.errors import KernelUnavailable
from fader_adapters.kernels.cuda import states_configs
from fader_adapters.kernels.cuda.states import CudaStates
from fader_server.core import RowResult
from fader_server.errors import EngineFault
from fader_server.model import graphs
from fader_server.model.launching import LaunchedStep
from fader_server.model.mixers import Mixers
from fader_server.model.packed_states import PackedStates
from fader_server.model.state_slots import NOBODY, StateSlots
from tests.support.own_states import bits
from tests.support.pretend_cuda import PretendDevice, unavailable
from tests.support.pretend_cuda.setting import SMALL, Setting, check, on_device, opened, same
from tests.support.pretend_cuda.world import PretendWorld
from tests.support.solo_families import DELTA
from tests.support.world import Ask, greedy

pytestmark = [
    pytest.mark.skipif(bool(unavailable()), reason=unavailable()),
    pytest.mark.slow,
]

STATE_SPACE: dict[str, Any] = {
    "layers_block_type": ["mamba", "attention"],
    "num_hidden_layers": 2,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "n_groups": 1,
    "head_dim": 32,
}
KINDS: dict[str, tuple[PretrainedConfig, list[str]]] = {
    "gated delta rules": (
        Qwen3_5TextConfig(**SMALL | {"num_hidden_layers": 2, "head_dim": 32} | DELTA),
        ["in_proj_qkv", "out_proj", "q_proj", "up_proj"],
    ),
    "a state space": (
        NemotronHConfig(**SMALL | STATE_SPACE),
        ["in_proj", "q_proj", "o_proj"],
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    config, targets = KINDS[request.param]
    adapters = {
        name: {"rank": rank, "target_modules": targets} for name, rank in (("a", 8), ("b", 20))
    }
    folder: Path = tmp_path_factory.mktemp("hybrid")
    found = Setting(folder, config, adapters)
    assert isinstance(found.reference.base.solo, Mixers)
    return found


@pytest.fixture(scope="module")
def device(setting: Setting) -> Iterator[PretendDevice]:
    with on_device() as found, pytest.MonkeyPatch.context() as patch:
        patch.setattr(states_configs, "VALUES", 32)
        yield found


@pytest.fixture(scope="module")
def world(setting: Setting, device: PretendDevice) -> PretendWorld:
    return opened(setting)


def states_of(world: PretendWorld) -> PackedStates:
    assert world.base.solo is None
    assert world.base.packed_states is not None
    return world.base.packed_states


def places(world: PretendWorld) -> list[int]:
    """Where the states of all layers lie."""
    kernels = [kernel for layer in states_of(world)._layers for kernel in layer.kernels._kernels()]
    assert len(kernels) == 2
    return [kernel.states.data_ptr() for kernel in kernels]


MIXED = [
    Ask(list(range(5, 8)), {}, greedy(5)),
    Ask(list(range(6, 25)), {"a": 1.0}, greedy(4)),
    Ask(list(range(7, 14)), {"a": 0.7, "b": -0.4}, greedy(4)),
]
"""Three rows in a bucket of four, a prompt in two chunks."""


def test_mixed_batches_give_the_references_answers_by_captured_steps(
    setting: Setting, world: PretendWorld, device: PretendDevice
) -> None:
    replays = world.runner._replays
    assert isinstance(replays, graphs.DecodeGraphs)
    assert replays.prompts is not None
    before, at = device.replays, places(world)
    check(setting, world, MIXED)
    assert device.replays - before >= len(world.plans)
    assert any(sum(row.count == 1 for row in plan.rows) == 3 for plan in world.plans)
    assert any({row.count > 1 for row in plan.rows} == {True, False} for plan in world.plans)
    assert places(world) == at, "graphs know them by address"
    assert world.led == 0
    assert {"conv_kernel", "scan_kernel", "gated_norm_kernel"} <= device.kernels


def test_a_row_has_the_bits_that_it_has_alone(world: PretendWorld) -> None:
    other = [Ask([token + 60 for token in ask.prompt], ask.blend, ask.params) for ask in MIXED]
    together = bits(world.run(other))
    assert [bits(world.run([ask]))[0] for ask in other] == together


def test_a_prefix_is_found_with_the_state_it_left(setting: Setting, world: PretendWorld) -> None:
    said = list(range(80, 120))
    first = check(setting, world, [Ask(said, {"a": 1.0}, greedy(3))])
    again = check(setting, world, [Ask(said, {"a": 1.0}, greedy(3)), Ask(said[:36], {}, greedy(2))])
    assert [answer.cached for answer in first + again] == [0, 32, 0]
    assert bits(again[:1]) == bits(first)


def test_a_step_that_fails_when_it_is_waited_for_runs_again_from_the_same_states(
    setting: Setting, world: PretendWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, failed = LaunchedStep.results, []

    def once(self: LaunchedStep) -> list[RowResult]:
        found = results(self)
        if len(self._parts[0].plan.rows) > 1 and not failed:
            failed.append(found)
            raise ValueError("planted")
        return found

    monkeypatch.setattr(LaunchedStep, "results", once)
    asks = [Ask([token + 90 for token in ask.prompt], {}, ask.params) for ask in MIXED[:2]]
    check(setting, world, asks)
    assert failed


def test_slots_that_do_not_reach_a_captured_step_show(
    setting: Setting, world: PretendWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = StateSlots.places

    def forgotten(self: StateSlots, rows: Any) -> tuple[list[int], list[int]]:
        came_from, to = own(self, rows)
        return [NOBODY] * len(came_from), to

    ask = Ask(list(range(30, 49)), {}, greedy(4))
    want = setting.reference.run([ask])
    with monkeypatch.context() as patch:
        patch.setattr(StateSlots, "places", forgotten)
        with pytest.raises(AssertionError):
            same(world.run([ask]), want)


def test_no_state_moves_once_steps_are_captured(world: PretendWorld) -> None:
    states = states_of(world)
    most = states.slots.most
    assert most == states._room
    states.slots.count += most
    try:
        with pytest.raises(EngineFault, match=f"room for {most} states"):
            states.places(world.plans[0])
    finally:
        states.slots.count -= most


def test_a_base_for_which_there_is_no_kernel_runs_row_by_row(
    setting: Setting,
    device: PretendDevice,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def scan(self: CudaStates, *_: object, **__: object) -> None:
        raise KernelUnavailable("no kernel for this recurrence")

    if not isinstance(setting.reference.base.model.config, NemotronHConfig):
        pytest.skip("one kind shows it")
    monkeypatch.setattr(CudaStates, "scan", scan)
    with caplog.at_level("INFO"):
        other = opened(setting)
    assert isinstance(other.base.solo, Mixers)
    assert other.base.packed_states is None
    assert "no kernel for this recurrence" in caplog.text
    assert "row by row" in caplog.text
    check(setting, other, [Ask(MIXED[1].prompt, {"a": 1.0}, greedy(2))])
