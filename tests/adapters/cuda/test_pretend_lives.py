"""What happens to a server over time, on the pretended device: evictions, swaps, lanes, rows that
fail, memory that runs out. Every run is checked for races and early reads as it goes."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_server.model import graphs
from tests.support.lanes import merge, publish
from tests.support.peft_adapters import write_adapter
from tests.support.pretend_cuda import PretendDevice, unavailable
from tests.support.pretend_cuda.setting import Setting, check, on_device, opened, same
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


def largest(world: TinyWorld, *names: str) -> int:
    """Elements of these adapters together."""
    return sum(
        next(iter(world.store.acquire([ref(name)]).adapters.values())).spec.numel for name in names
    )


def ref(name: str):
    from fader_adapters.leases import AdapterRef

    return AdapterRef(name, None, 1.0)


def prompts(count: int, start: int = 5) -> list[list[int]]:
    return [list(range(start + 7 * i, start + 7 * i + (3, 9, 5, 18)[i % 4])) for i in range(count)]


def test_adapters_that_take_turns_in_a_small_arena_give_the_references_answers(
    setting: Setting, device: PretendDevice
) -> None:
    world = opened(setting, arena=9000)
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


def test_a_row_that_overflows_ends_alone(setting: Setting, device: PretendDevice, tmp_path) -> None:
    wild = write_adapter(setting.source, tmp_path / "wild", rank=4, seed=5, scale=1e30)
    world = opened(setting)
    world.load("wild", wild)
    asks = [Ask(p, {"a": 1.0}, greedy(4)) for p in prompts(2)]
    want = setting.reference.run(asks)
    got = world.run([asks[0], Ask([50, 51, 52], {"wild": 1.0}, greedy(4)), asks[1]])
    same([got[0], got[2]], want)
    assert got[1].error is not None
    same(
        world.run([Ask([50, 51, 52], {}, greedy(3))]),
        setting.reference.run([Ask([50, 51, 52], {}, greedy(3))]),
    )


def test_preempted_rows_go_on_as_if_nothing_had_been(
    setting: Setting, device: PretendDevice
) -> None:
    world = opened(setting, blocks=6)
    asks = [Ask(p, {"a": 1.0} if i % 2 else {}, greedy(14)) for i, p in enumerate(prompts(4))]
    check(setting, world, asks)
    assert world.scheduler.preemptions
