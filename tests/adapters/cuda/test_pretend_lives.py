"""What happens to a server over time, on the pretended device: evictions, swaps, lanes, rows that
fail, memory that runs out. Every run is checked for races and early reads as it goes."""

from collections.abc import Iterator

import pytest
import torch
import transformers
from transformers import LlamaConfig

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_adapters.leases import AdapterRef
from fader_server.model import graphs
from tests.support.lanes import merge, publish
from tests.support.peft_adapters import write_adapter
from tests.support.pretend_cuda import PretendDevice, unavailable
from tests.support.pretend_cuda.setting import SMALL, Setting, check, on_device, opened, same
from tests.support.world import Ask, TinyWorld, greedy

pytestmark = [
    pytest.mark.skipif(bool(unavailable()), reason=unavailable()),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def device(setting: Setting) -> Iterator[PretendDevice]:
    with on_device() as found:
        yield found


def prompts(count: int, start: int = 5) -> list[list[int]]:
    return [list(range(start + 7 * i, start + 7 * i + (3, 9, 5, 18)[i % 4])) for i in range(count)]


def test_adapters_that_take_turns_in_a_small_arena_give_the_references_answers(
    setting: Setting, device: PretendDevice
) -> None:
    world = opened(setting, arena=26_000)
    names = ["a", "b", "dora", "bias", "tokens", "ends", "b", "a"]
    asks = [Ask(p, {n: 1.0}, greedy(3)) for p, n in zip(prompts(8), names, strict=True)]
    check(setting, world, asks)
    assert world.pool.evictions > 2


def test_a_name_that_moves_while_its_streams_run(
    setting: Setting, device: PretendDevice, tmp_path
) -> None:
    other = write_adapter(setting.source, tmp_path / "other", rank=8, seed=77)
    asks = [Ask(p, {"a": 1.0}, greedy(4)) for p in prompts(2)]
    later = [Ask(p, {"a": 0.5}, greedy(3)) for p in prompts(2, 90)]

    def served(world: TinyWorld):
        step, steps = world.step, []

        def stepped(answers):
            steps.append(1)
            if len(steps) == 3:
                world.load("a", other)
            return step(answers)

        world.step = stepped
        first = world.run(asks)
        world.step = step
        return first + world.run(later)

    world = opened(setting)
    got = served(world)
    same(got, served(setting.reference))
    setting.load(setting.reference)


@pytest.mark.parametrize("form", ["nf4", "bf16"])
def test_a_lane_beside_streams(setting: Setting, device: PretendDevice, form) -> None:
    blend = {"a": 0.7, "ends": -0.4, "dora": 0.5}
    asks = [
        Ask([5, 6, 7], blend, greedy(3)),
        Ask([8, 9, 10, 11], {"a": 1.0}, greedy(3)),
        Ask(list(range(30, 50)), blend, greedy(3, prompt_logprobs=0)),
    ]
    world = opened(setting)
    lanes = [publish(w, merge(w, blend, form=form)) for w in (world, setting.reference)]
    check(setting, world, asks)
    own = world.runner._lanes[lanes[0].lane].replays
    assert isinstance(own, graphs.DecodeGraphs)
    assert own.captured
    for w in (world, setting.reference):
        w.scheduler.lanes.replace(None)
    assert all(lane.gone for lane in lanes)
    lanes.clear()
    torch.cuda.synchronize()
    check(setting, world, asks)


def test_a_row_that_is_not_finite_ends_alone(setting: Setting, device: PretendDevice) -> None:
    world = opened(setting)
    with world.store.acquire([AdapterRef("dora", None, 1.0)]) as lease:
        for data in lease.adapters.values():
            data.flat.fill_(float("inf"))
    asks = [Ask(p, {"a": 1.0}, greedy(4)) for p in prompts(2)]
    got = world.run([asks[0], Ask([50, 51, 52], {"dora": 1.0}, greedy(4)), asks[1]])
    assert got[1].error is not None
    same([got[0], got[2]], setting.reference.run(asks))
    check(setting, world, [Ask([50, 51, 52], {}, greedy(3))])


def test_preempted_rows_go_on_as_if_nothing_had_been(
    setting: Setting, device: PretendDevice
) -> None:
    world = opened(setting, blocks=6)
    blends = ({"a": 1.0}, {})
    asks = [Ask(list(range(9 + i, 23 + i)), blend, greedy(24)) for i, blend in enumerate(blends)]
    check(setting, world, asks)
    assert world.scheduler.preemptions


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Experts: which rows a linear of theirs is given depends on values."""
    config = transformers.MixtralConfig(**SMALL, num_local_experts=3, num_experts_per_tok=2)
    attention = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    adapters = {"a": {"rank": 8, **attention}, "b": {"rank": 4, **attention}}
    return Setting(tmp_path_factory.mktemp("mixtral"), config, adapters)


def test_a_mixture_of_experts(mixture: Setting, device: PretendDevice) -> None:
    world = opened(mixture)
    asks = [Ask(p, {n: 1.0}, greedy(3)) for p, n in zip(prompts(3), ("a", "b", "a"), strict=True)]
    check(mixture, world, asks)


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Its rotary embedding asks the host how long the sequences are."""
    rope = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0}
    config = LlamaConfig(**SMALL, rope_parameters=rope)
    return Setting(tmp_path_factory.mktemp("dynamic"), config, {"a": {"rank": 8}})


def test_a_base_that_asks_the_host_is_served_without_graphs(
    asking: Setting, device: PretendDevice
) -> None:
    world = opened(asking)
    assert world.runner._replays is None
    check(asking, world, [Ask(p, {"a": 1.0}, greedy(3)) for p in prompts(2)])
    assert device.waits["_local_scalar_dense"]
