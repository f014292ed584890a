"""Steps that are begun and waited for once: the same tokens, and the order of copies and waits."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fader_server.core import Plan, RowResult
from fader_server.model import passage, sampler
from fader_server.model.launching import LaunchingRunner
from fader_server.model.runner import ModelRunner
from tests.adapters.cuda.test_backend import Setting, asks, told, use_cuda, use_graphs
from tests.support import world as support
from tests.support.world import TinyWorld

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
