"""Steps that are begun and waited for once: the same tokens, and the order of copies and waits."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from fader_server.core import Plan, RowResult, SamplingParams
from fader_server.engine.stats import Unobserved
from fader_server.engine.stepper import Stepper
from fader_server.model import passage, sampler
from fader_server.model.graph_inputs import GraphInputs
from fader_server.model.launching import LaunchedStep, LaunchingRunner
from fader_server.model.runner import ModelRunner
from tests.adapters.cuda.test_backend import Setting, asks, told, use_cuda, use_graphs
from tests.support import world as support
from tests.support.world import Answer, TinyWorld, greedy

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny engine is on the CPU")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Copies of results to the host and waits for them, as they happen."""
    found: list[str] = []

    def to_host(values: torch.Tensor) -> Callable[[], list[float]]:
        found.append("copy")
        wait = passage.to_host(values)

        def waited() -> list[float]:
            found.append("wait")
            return wait()

        return waited

    monkeypatch.setattr(sampler, "to_host", to_host)
    use_cuda(monkeypatch)
    use_graphs(monkeypatch)
    return found


def launching(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> TinyWorld:
    monkeypatch.setattr(support, "ModelRunner", LaunchingRunner)
    return setting.world()


def steps(world: TinyWorld, order: list[str]) -> list[tuple[Plan, list[str]]]:
    """Every step that runs from now on, with what happened in it."""
    run, found = world.runner.run, []

    def recorded(plan: Plan) -> list[RowResult]:
        order.clear()
        results = run(plan)
        found.append((plan, list(order)))
        return results

    world.runner.run = recorded  # pyright: ignore[reportAttributeAccessIssue]
    return found


def mixed(plan: Plan) -> bool:
    """Whether rows of both kinds sample: two forwards, two draws."""
    return {row.count == 1 for row in plan.rows if row.samples} == {True, False}


@pytest.mark.slow
def test_a_mixed_step_is_queued_whole_before_anything_is_waited_for(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, order: list[str]
) -> None:
    plain = setting.world()
    in_turn = steps(plain, order)
    want = told(plain.run(asks(2)))
    ahead = launching(setting, monkeypatch)
    queued = steps(ahead, order)
    assert told(ahead.run(asks(2))) == want, "the same bits"
    (before, *_), (after, *_) = (
        [did for plan, did in run if mixed(plan)] for run in (in_turn, queued)
    )
    assert before == ["copy", "wait", "copy", "wait"]
    assert after == ["copy", "copy", "wait", "wait"]


@pytest.mark.slow
def test_only_a_replay_begins_before_results_are_asked_for(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, order: list[str]
) -> None:
    world = launching(setting, monkeypatch)
    runner = world.runner
    assert isinstance(runner, LaunchingRunner)
    begun: dict[bool, set[int]] = {True: set(), False: set()}

    def run(plan: Plan) -> list[RowResult]:
        order.clear()
        step = runner.launch(plan)
        begun[plan.rows[0].count == 1].add(len(order))
        return step.results()

    monkeypatch.setattr(runner, "run", run)
    world.run(asks(2))
    assert begun == {True: {1}, False: {0}}


def going_on(world: TinyWorld, patch: pytest.MonkeyPatch) -> list[int]:
    """Has the world's steps driven as the engine does; rows of each that began ahead."""
    answers: dict[str, Answer] = {}
    stepper = Stepper(
        world.scheduler,
        world.runner,
        world.pool.upload,
        deliver=lambda event: support._note(answers[event.request_id], event),
        clock=lambda: 0.0,
        observer=Unobserved(),
    )

    def step(own: dict[str, Answer]) -> bool:
        answers.update(own)
        return stepper.turn()

    assert isinstance(world.runner, LaunchingRunner)
    go_on, begun = world.runner.go_on, []

    def noted(plan: Plan, tokens: torch.Tensor) -> LaunchedStep:
        begun.append(len(plan.rows))
        return go_on(plan, tokens)

    patch.setattr(world, "step", step)
    patch.setattr(world.runner, "go_on", noted)
    return begun


PARAMS = (
    greedy(5, logprobs=3, logit_bias=((3, 5.0),)),
    SamplingParams(
        temperature=1.1, seed=11, max_tokens=5, min_tokens=3, logprobs=0,
        stop_token_ids=frozenset(range(0, 256, 2)),
    ),
)  # fmt: skip


@pytest.mark.slow
def test_steps_that_go_on_by_tokens_the_host_has_not_seen_give_the_same(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, order: list[str]
) -> None:
    """A greedy row with an adapter beside one that is drawn, and may stop, on the base."""
    given = [
        replace(ask, params=params)
        for ask, params in zip((asks(2)[1], asks(1)[0]), PARAMS, strict=True)
    ]
    want = told(launching(setting, monkeypatch).run(given))
    world = launching(setting, monkeypatch)
    begun = going_on(world, monkeypatch)
    assert told(world.run(given)) == want
    assert 2 in begun


@pytest.mark.slow
def test_a_step_that_went_on_by_another_token_would_be_noticed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, order: list[str]
) -> None:
    want = told(launching(setting, monkeypatch).run(asks(1)))
    world = launching(setting, monkeypatch)
    going_on(world, monkeypatch)
    fill = GraphInputs.fill

    def late(
        self: GraphInputs, plan: Plan, bucket: int, tokens: torch.Tensor | None = None
    ) -> None:
        fill(self, plan, bucket, None if tokens is None else tokens + 1)

    monkeypatch.setattr(GraphInputs, "fill", late)
    assert told(world.run(asks(1))) != want


@pytest.mark.slow
def test_rows_whose_next_token_depends_on_counts_of_the_last_ones_do_not_lead(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, order: list[str]
) -> None:
    params = greedy(3, repetition_penalty=1.3, frequency_penalty=0.5)
    world = launching(setting, monkeypatch)
    begun = going_on(world, monkeypatch)
    assert told(world.run([replace(asks(1)[0], params=params)]))
    assert not begun
    world.run(asks(1))
    assert begun


def test_a_runner_that_waits_has_no_launch() -> None:
    from fader_server.core import LaunchRunner

    assert issubclass(LaunchingRunner, LaunchRunner)
    assert not issubclass(ModelRunner, LaunchRunner)


def test_arrays_packed_for_one_copy_are_the_arrays_and_aligned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks: list[np.ndarray] = []

    def sent(block: np.ndarray, device: torch.device) -> torch.Tensor:
        blocks.append(block)
        return torch.from_numpy(block)

    monkeypatch.setattr(passage, "to_device", sent)
    arrays = [
        np.arange(3).reshape(1, 3),
        np.arange(5, dtype=np.int32),
        np.zeros(0, np.int64),
        np.arange(6, dtype=np.int32).reshape(2, 3),
    ]
    got = passage.packed(arrays, torch.device("meta"))
    assert len(blocks) == 1
    for array, tensor in zip(arrays, got, strict=True):
        assert torch.equal(tensor, torch.from_numpy(array))
        assert tensor.dtype == torch.from_numpy(array).dtype
        assert tensor.storage_offset() * tensor.itemsize % passage.ALIGN == 0
    assert len({t.untyped_storage().data_ptr() for t in got}) == 1
