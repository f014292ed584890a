"""How the slots of rows' states reach steps: through fixed buffers, in one copy, and no step begins
ahead where rows leave states."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_adapters.spec import RowTerms, StepTerms
from fader_server.core import Plan, PlanRow, Request, SamplingParams, Sequence
from fader_server.errors import EngineFault
from fader_server.model import launching
from fader_server.model.batch import Batch
from fader_server.model.graph_inputs import GraphInputs
from fader_server.model.launching import LaunchedStep
from fader_server.model.prompt_graphs import PROMPT_ROWS, PromptInputs
from fader_server.model.state_slots import StateSlots

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors are on the CPU")
CPU = torch.device("cpu")


def plan_of(*rows: tuple[int, int]) -> Plan:
    """Rows of (first token, tokens)."""
    made = tuple(
        PlanRow(
            Sequence(Request(f"r{i}", (1,), SamplingParams()), list(range(60)), blocks=[1, 2, 3]),
            start, count, True,
        )
        for i, (start, count) in enumerate(rows)
    )  # fmt: skip
    return Plan(made, StepTerms(tuple(RowTerms(row.count) for row in made)))


def somewhere(plan: Plan) -> tuple[list[int], list[int]]:
    count = len(plan.rows)
    return [10 + i for i in range(count)], [20 + i for i in range(count)]


def addresses(batch: Batch) -> list[int]:
    assert batch.states is not None
    return [t.data_ptr() for t in (batch.states.start, batch.states.came_from, batch.states.to)]


def told(batch: Batch) -> tuple[list[int], list[int], list[int]]:
    states = batch.states
    assert states is not None
    return states.start.tolist(), states.came_from.tolist(), states.to.tolist()


def test_a_decode_steps_slots_come_through_buffers_and_paddings_are_nobodys() -> None:
    inputs = GraphInputs(rows=4, context=64, block_size=16, device=CPU, states=somewhere)
    batch = inputs.batch(4)
    before = addresses(batch)
    assert told(batch) == ([0, 1, 2, 3, 4], [-1] * 4, [-1] * 4), "as a capture finds them"
    inputs.fill(plan_of((5, 1), (7, 1), (30, 1)), 4)
    assert told(batch) == ([0, 1, 2, 3, 4], [10, 11, 12, -1], [20, 21, 22, -1])
    assert told(inputs.batch(2)) == ([0, 1, 2], [10, 11], [20, 21])
    assert batch.slots.tolist() == [21, 23, 46, -1]
    assert addresses(inputs.batch(4)) == before
    assert told(inputs.prompt(9)) == ([0, 9], [-1], [-1])


def test_a_prompt_steps_slots_come_through_buffers_and_paddings_are_nobodys() -> None:
    inputs = PromptInputs(tokens=32, context=64, block_size=16, device=CPU, states=somewhere)
    batch = inputs.batch(32)
    before, nobody = addresses(batch), [-1] * PROMPT_ROWS
    assert told(batch)[1:] == (nobody, nobody)
    inputs.fill(plan_of((0, 9), (16, 5)), 32)
    starts, came_from, to = told(batch)
    assert starts == [0, 9] + [14] * (PROMPT_ROWS - 1)
    assert came_from == [10, 11, *nobody[2:]]
    assert to == [20, 21, *nobody[2:]]
    inputs.fill(plan_of((0, 9)), 32)
    assert told(batch)[1:] == ([10, *nobody[1:]], [20, *nobody[1:]])
    assert addresses(inputs.batch(32)) == before


def test_a_base_without_states_has_none() -> None:
    given: dict[str, Any] = {"context": 64, "block_size": 16, "device": CPU}
    assert GraphInputs(rows=4, **given).batch(2).states is None
    assert GraphInputs(rows=4, **given).prompt(5).states is None
    assert PromptInputs(tokens=32, **given).batch(16).states is None
    assert Batch.from_plan(plan_of((0, 3)), block_size=16, device=CPU).states is None


def test_slots_go_to_a_device_in_the_one_copy_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from fader_server.model import passage

    copies = []

    def sent(block: Any, device: torch.device) -> torch.Tensor:
        copies.append(device)
        return torch.from_numpy(block)

    monkeypatch.setattr(passage, "to_device", sent)
    there = torch.device("meta")
    batch = Batch.from_plan(plan_of((0, 9), (16, 1)), block_size=16, device=there, states=somewhere)
    assert copies == [there]
    assert told(batch) == ([0, 9, 10], [10, 11], [20, 21])


@pytest.mark.parametrize("keeps", [False, True])
def test_no_step_begins_ahead_where_rows_leave_states(
    keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "LeadingReplays", object)
    part: Any = SimpleNamespace(plan=plan_of((5, 1)), replays=object())
    runner: Any = SimpleNamespace(keeps_states=keeps)
    drawn: Any = SimpleNamespace(tokens=torch.zeros(1))
    assert (LaunchedStep(runner, [part], [drawn]).ahead is None) == keeps


def test_of_two_steps_under_way_the_first_could_not_run_again() -> None:
    """Why none does: the second writes over what the first went on from."""
    slots = StateSlots()
    sequence = plan_of((0, 1)).rows[0].sequence
    steps = [[PlanRow(sequence, at, 1, True)] for at in range(3)]
    for step in steps[:2]:
        came_from, to = slots.places(step)
        slots.computed(step)
    assert slots.places(steps[1]) == (came_from, to), "alone it can"
    slots.computed(steps[1])
    assert slots.places(steps[2]) == (to, came_from)
    with pytest.raises(EngineFault, match="not where its step begins"):
        slots.places(steps[1])
