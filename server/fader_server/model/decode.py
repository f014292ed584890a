"""Decode steps of the native backend: recorded once a number of rows, then replayed.

A replay is trusted after it gave, on another step, bit for bit what the model's own code gives.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, runtime_checkable

import torch

from fader_adapters.kernels.backend import Step
from fader_adapters.kernels.native import (
    Site,
    StateRows,
    StepInputs,
    StepPlan,
    Tape,
    Workspace,
)
from fader_adapters.step_state import LaneWeights
from fader_server.core import Plan
from fader_server.model.batch import AttentionRow, Batch
from fader_server.model.recording import Recorder, Unrepeatable
from fader_server.model.replay import Arena, Replay

if TYPE_CHECKING:  # needs greenlet, which a base without states does not
    from fader_server.model.packed_states import PackedStates

log = logging.getLogger(__name__)

Own = TypeVar("Own")
Forward = Callable[[Batch], torch.Tensor]
"""The model's own forward: logits [rows, vocab]."""


class Replays(Protocol):
    """Steps that run in a quicker way than operator by operator."""

    def takes(self, plan: Plan) -> bool:
        """Whether `run` knows a way for this plan."""
        ...

    def run(self, plan: Plan, step: Step | None, forward: Forward) -> torch.Tensor:
        """Logits [rows that sample, vocab], those of `forward`; valid until the next step."""
        ...

    def sibling(self, lane: LaneWeights) -> "Replays":
        """A set for a lane's weights, in the same memory: one of them runs at a time."""
        ...


@runtime_checkable
class LeadingReplays(Replays, Protocol):
    """Decode steps that can be queued before the host knows their tokens."""

    def run_ahead(
        self, plan: Plan, step: Step | None, forward: Forward, tokens: torch.Tensor
    ) -> torch.Tensor:
        """As `run` for rows of one token each, which only the device knows: tokens [rows] int64."""
        ...


def decodes(plan: Plan) -> bool:
    """Whether every row of the step is one token that samples."""
    return all(
        row.count == 1 and row.samples and not row.wants_prompt_logprobs for row in plan.rows
    )


class DecodeInputs:
    """The tensors of decode steps of up to `rows` rows, at addresses that never change."""

    def __init__(
        self,
        *,
        rows: int,
        blocks_per_row: int,
        block_size: int,
        states: "PackedStates | None" = None,
    ) -> None:
        """states: of a base whose layers keep some."""
        self._block_size = block_size
        self._states = states
        self._ids = torch.zeros(1, rows, dtype=torch.int64)
        self._positions = torch.zeros(1, rows, dtype=torch.int64)
        self._slots = torch.zeros(rows, dtype=torch.int64)
        self._contexts = torch.zeros(rows, dtype=torch.int32)
        self._tables = torch.zeros(rows, blocks_per_row, dtype=torch.int32)
        self._starts = torch.arange(rows + 1, dtype=torch.int32)
        self._index = torch.arange(rows)
        self._came_from = torch.zeros(rows, dtype=torch.int32)
        self._to = torch.zeros(rows, dtype=torch.int32)

    def fill(self, plan: Plan) -> None:
        """Write the plan's rows, one token each."""
        rows, size = plan.rows, self._block_size
        starts = [row.start for row in rows]
        blocks = [row.sequence.blocks for row in rows]
        n = len(rows)
        self._ids.numpy()[0, :n] = [row.tokens[0] for row in rows]
        self._positions.numpy()[0, :n] = starts
        self._contexts.numpy()[:n] = [at + 1 for at in starts]
        self._slots.numpy()[:n] = [
            own[at // size] * size + at % size for own, at in zip(blocks, starts, strict=True)
        ]
        tables = self._tables.numpy()
        for i, own in enumerate(blocks):
            used = starts[i] // size + 1
            tables[i, :used] = own[:used]
        if self._states is not None:
            self._came_from.numpy()[:n], self._to.numpy()[:n] = self._states.places(plan)

    def step(self, rows: int) -> StepInputs:
        return StepInputs(
            self._starts[: rows + 1],
            self._contexts[:rows],
            self._tables[:rows],
            self._slots[:rows],
            self._came_from[:rows],
            self._to[:rows],
        )

    def batch(self, plan: Plan) -> Batch:
        """The same as the model's own forward takes it."""
        n = len(plan.rows)
        step = self.step(n)
        return Batch(
            input_ids=self._ids[:, :n],
            position_ids=self._positions[:, :n],
            slots=step.slots,
            cu_tokens=step.q_start,
            contexts=step.context,
            block_tables=step.block_tables,
            logit_index=self._index[:n],
            rows=tuple(AttentionRow(i, 1, row.start + 1) for i, row in enumerate(plan.rows)),
            sampling=tuple(range(n)),
            scored=(),
            states=None if self._states is None else states_of(step),
        )


def states_of(step: StepInputs) -> StateRows:
    """Where the states of a step's rows lie."""
    assert step.state_from is not None
    assert step.state_to is not None
    return StateRows(step.q_start, step.state_from, step.state_to)


class DecodeReplays:
    """One replay for every number of rows that was met; steps it cannot take go the usual way."""

    def __init__(
        self,
        tape: Tape,
        inputs: DecodeInputs,
        *,
        rows: int,
        arena: Arena,
        scratch: Workspace,
    ) -> None:
        self._tape = tape
        self._inputs = inputs
        self._rows = rows
        self._arena, self._scratch = arena, scratch
        self._trusted: dict[int, Replay] = {}
        self._candidates: dict[int, Replay] = {}
        self._enabled = True
        self._elder: Elder[DecodeReplays] | None = None

    def sibling(self, moved: "Moved | None") -> "DecodeReplays":
        """A set over other sites, in the same memory: one of them runs at a time.

        Whatever replay this one trusts by then does for the other too once one of them has given
        the right bits there: they differ in addresses alone. None: an empty set.
        """
        other = DecodeReplays(
            self._tape, self._inputs, rows=self._rows, arena=self._arena, scratch=self._scratch
        )
        other._enabled = self._enabled
        other._elder = None if moved is None else Elder(self, moved)
        return other

    @property
    def enabled(self) -> bool:
        """Whether no replay has been refuted so far."""
        return self._enabled

    def takes(self, plan: Plan) -> bool:
        """Whether every row of the step is one token that samples."""
        return self._enabled and len(plan.rows) <= self._rows and decodes(plan)

    def run(self, plan: Plan, step: Step | None, forward: Forward) -> torch.Tensor:
        """Logits [rows, vocab], those of `forward`; valid until the next step."""
        assert step is None or isinstance(step, StepPlan)
        rows = len(plan.rows)
        self._inputs.fill(plan)
        self._inherit(rows)
        trusted = self._trusted.get(rows)
        if trusted is not None:
            return trusted(step)
        batch = self._inputs.batch(plan)
        candidate = self._candidates.pop(rows, None)
        if candidate is None:
            return self._record(batch, forward)
        logits = forward(batch)
        reason = refuted(lambda: [candidate(step)], [logits])
        if reason:
            self._give_up(reason)
            return forward(batch)  # and the keys and values that it wrote are the model's again
        self._trusted[rows] = candidate
        if self._elder is not None and candidate.inherited:
            self._elder.moved.proven = True
        return logits

    def _inherit(self, rows: int) -> None:
        elder = self._elder
        if elder is None or rows in self._trusted or rows in self._candidates:
            return
        theirs = elder.replays._trusted.get(rows)
        if theirs is not None:
            ours = self._trusted if elder.moved.proven else self._candidates
            ours[rows] = theirs.over(elder.moved.sites)

    def _record(self, batch: Batch, forward: Forward) -> torch.Tensor:
        rows = len(batch.rows)
        try:
            recording = Recorder(self._tape).record(lambda: forward(batch))
        except Unrepeatable as reason:
            self._give_up(str(reason))
            return forward(batch)
        self._candidates[rows] = Replay(
            recording, self._inputs.step(rows), arena=self._arena, scratch=self._scratch
        )
        return recording.result

    def _give_up(self, reason: str) -> None:
        self._enabled = False
        self._trusted.clear()
        self._candidates.clear()
        log.info("decode steps run operator by operator: %s", reason)


@dataclass
class Moved:
    """What a lane's calls name instead of the base's sites; of both kinds of steps."""

    sites: Mapping[int, Site]
    """By the address of each of the base's that gives way."""
    proven: bool = False
    """Whether a decode step over them gave the bits of the model's own code."""


@dataclass(frozen=True)
class Elder(Generic[Own]):
    """Replays of the base, for those of a lane that run the same calls over other sites."""

    replays: Own
    moved: Moved


def refuted(replay: Callable[[], list[torch.Tensor]], expected: Sequence[torch.Tensor]) -> str:
    """Why a replay is not to be trusted; empty where it gives what the model's code gave."""
    try:
        same = all(same_bits(*pair) for pair in zip(replay(), expected, strict=True))
    except Exception as error:  # noqa: BLE001 - whatever it is, the model's code has answered
        return f"a replay failed: {error}"
    return "" if same else "a replay gave other bits than the model's code"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    return a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
