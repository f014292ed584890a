"""The server's own code on the pretended device: the reference's answers, and no race, early read
or wait where a GPU would have one."""

from collections import Counter
from collections.abc import Iterator, Mapping

import pytest
from transformers import GraniteSWAConfig

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_server.core import SamplingParams
from fader_server.model import graphs
from fader_server.model.cuda_attention import CudaAttention
from tests.support.pretend_cuda import PretendDevice, unavailable
from tests.support.pretend_cuda.setting import ADAPTERS, SMALL, Setting, check, on_device, opened
from tests.support.pretend_cuda.world import PretendWorld
from tests.support.world import Ask, greedy

pytestmark = [
    pytest.mark.skipif(bool(unavailable()), reason=unavailable()),
    pytest.mark.slow,
]


WHOLE = {
    "rank": 4,
    "target_modules": ["o_proj"],
    "modules_to_save": ["embed_tokens", "lm_head"],
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    every = ADAPTERS | {"whole": WHOLE, "rows": WHOLE | {"rows": range(40, 60)}}
    return Setting(tmp_path_factory.mktemp("llama"), adapters=every)


@pytest.fixture(scope="module")
def device(setting: Setting) -> Iterator[PretendDevice]:
    with on_device() as found:
        yield found


@pytest.fixture(scope="module")
def world(setting: Setting, device: PretendDevice) -> PretendWorld:
    found = opened(setting)
    assert isinstance(found.runner._attention, CudaAttention)
    assert isinstance(found.runner._replays, graphs.DecodeGraphs)
    return found


def mixed(blends: list[Mapping[str, float]], start: int = 5, count: int = 3) -> list[Ask]:
    lengths = (3, 18, 7, 5)
    return [
        Ask(list(range(start + i, start + i + lengths[i])), blend, greedy(count))
        for i, blend in enumerate(blends)
    ]


def test_mixed_batches_of_blends_give_the_references_answers(
    setting: Setting, world: PretendWorld, device: PretendDevice
) -> None:
    before = device.replays
    check(setting, world, mixed([{}, {"a": 1.0}, {"b": 0.5}, {"a": 0.7, "b": -0.4}]))
    assert any({r.count == 1 for r in p.rows} == {True, False} for p in world.plans)
    assert device.replays > before


def test_every_kind_of_adapter_gives_the_references_answers(
    setting: Setting, world: PretendWorld
) -> None:
    blends = [{"dora": 1.0}, {"bias": 1.0}, {"ends": 1.0}, {"ends": 0.5, "tokens": 0.5, "a": -0.3}]
    check(setting, world, mixed(blends, start=40))


def test_ends_that_were_trained_whole_give_the_references_answers(
    setting: Setting, world: PretendWorld, device: PretendDevice
) -> None:
    before = device.replays
    blends = [{"whole": 1.0}, {"rows": 1.0}, {"whole": 0.5, "rows": 0.3}, {}]
    check(setting, world, mixed(blends, start=40))
    assert device.replays > before


SAMPLED: list[dict] = [
    {"temperature": 0.8, "seed": 3, "top_k": 7, "top_p": 0.9, "logprobs": 2},
    {"seed": 4, "min_p": 0.1, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 0.0, "logit_bias": ((9, 4.0), (11, -3.0)), "frequency_penalty": 0.7},
    {
        "temperature": 0.0,
        "stop_token_ids": frozenset((7, 9)),
        "min_tokens": 2,
        "prompt_logprobs": 1,
    },
]


def test_every_way_to_sample_gives_the_references_tokens(
    setting: Setting, world: PretendWorld
) -> None:
    prompts = [list(range(60 + i, 66 + 2 * i)) for i in range(4)]
    asks = [
        Ask(prompt, blend, SamplingParams(max_tokens=4, **given))
        for prompt, blend, given in zip(
            prompts, [{}, {"a": 1.0}, {"ends": 1.0}, {"bias": 0.5}], SAMPLED, strict=True
        )
    ]
    check(setting, world, asks)


def test_a_prefix_that_is_found_again_gives_the_references_answers(
    setting: Setting, world: PretendWorld
) -> None:
    prompt = list(range(80, 120))
    for _ in range(2):
        (answer,) = check(
            setting, world, [Ask(prompt, {"a": 1.0}, greedy(2, prompt_logprobs=None))]
        )
    assert answer.cached == 32


def test_activated_adapters_give_the_references_answers_over_blocks_of_the_base(
    setting: Setting, world: PretendWorld
) -> None:
    said = list(range(100, 120))
    call = Ask([*said, 147, 148, 9], {"late": 1.0}, greedy(3, prompt_logprobs=None))
    check(setting, world, [Ask(said, {}, greedy(2))])
    (answer,) = check(setting, world, [call])
    assert answer.cached == 16
    beside = [{}, {"late": 0.7, "a": 0.4}, {"late": -1.0}, {"late": 1.0}]
    prompts = [call.prompt, [*said[:9], *call.prompt[-3:]], [147, 148, 3], said]
    asks = zip(prompts, beside, strict=True)
    check(setting, world, [Ask(prompt, blend, greedy(3)) for prompt, blend in asks])
    assert {1, 2} <= {len(row.terms) for plan in world.plans for row in plan.terms.rows}


def test_a_decode_step_waits_once_and_for_its_own_copy_alone(
    world: PretendWorld, device: PretendDevice
) -> None:
    steps: list[Counter[str]] = []
    turn = world.stepper.turn

    def counted() -> bool:
        before, replays = Counter(device.waits), device.replays
        found = turn()
        if device.replays > replays:
            steps.append(Counter(device.waits) - before)
        return found

    world.stepper.turn = counted  # pyright: ignore[reportAttributeAccessIssue]
    world.run(mixed([{}, {"a": 1.0}, {"b": 0.5}, {"dora": 0.7}], count=4))
    world.stepper.turn = turn
    assert len(steps) >= 3
    for waited in steps:
        assert set(waited) == {"event"}


def test_layers_with_sinks_give_the_references_answers(
    tmp_path_factory: pytest.TempPathFactory, device: PretendDevice
) -> None:
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    config = GraniteSWAConfig(**(SMALL | layers | {"sliding_window": 8}))
    setting = Setting(tmp_path_factory.mktemp("sinks"), config, {"a": {"rank": 8}})
    world = opened(setting)
    before = device.replays
    check(setting, world, mixed([{}, {"a": 1.0}, {"a": 0.5}]))
    assert device.replays > before
