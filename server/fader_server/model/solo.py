"""Models that mix tokens outside transformers' attention function: each sequence runs alone,
through the model's own code and cache, but for the linears, which all rows of a step share.

Recurrent states, convolutions, biases by distance, indexed attention: whatever the model does with
its cache it does here. What a sequence has computed nobody else can go on with.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from transformers import Cache, PreTrainedModel

from fader_adapters.kernels.backend import Step
from fader_adapters.spec import RowTerms, StepTerms
from fader_adapters.step_state import StepState
from fader_server.core import Plan, PlanRow, Sequence
from fader_server.errors import EngineFault
from fader_server.model.alone import SoloModel
from fader_server.model.batch import Batch
from fader_server.model.meeting import Meeting
from fader_server.model.states import Snapshot, restore, snapshot

PrepareStep = Callable[[StepTerms], Step | None]
"""The backend's work for some rows."""


class OwnForward(Protocol):
    """The forward of rows that keep states of their own."""

    def run(
        self,
        plan: Plan,
        batch: Batch,
        *,
        prepare: PrepareStep,
        packed: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """[len(batch.logit_index), vocab] of a plan and what `Batch.from_plan` made of it.

        packed: computes them with keys and values in the engine's cache, all rows in one forward
        """
        ...


@dataclass(slots=True)
class _Held:
    """A running sequence's cache, and what it was one step ago: a step may be run again."""

    cache: Cache
    computed: int | None = 0
    """Tokens it holds; None: a forward did not come to its end."""
    before: tuple[int, Snapshot] | None = None


class States:
    """Of the sequences that run, by identity."""

    def __init__(self, new: Callable[[], Cache]) -> None:
        self._new = new
        self._held: WeakKeyDictionary[Sequence, _Held] = WeakKeyDictionary()

    def drop_ended(self) -> None:
        """Who has no blocks ended or was sent back, and begins anew."""
        for sequence in [s for s in self._held if not s.blocks]:
            del self._held[sequence]

    def at(self, sequence: Sequence, start: int) -> _Held:
        """Its cache as it was with `start` tokens. Raises EngineFault when that is not known."""
        held = self._held.get(sequence)
        if start == 0:
            held = self._held[sequence] = _Held(self._new())
        elif held is not None and held.computed == start:
            held.before = start, snapshot(held.cache)
        elif held is not None and held.before is not None and held.before[0] == start:
            restore(held.cache, held.before[1])
        else:
            raise EngineFault("the state of this sequence is not where its step begins")
        return held


class SoloForward:
    """The forwards of a step's rows. Call on the engine's thread, under inference mode."""

    def __init__(self, model: PreTrainedModel, state: StepState) -> None:
        """`state`: of the linears that are installed in the model. Raises ModelUnsupported."""
        self.solo = SoloModel(model)
        self._state = state
        self._meeting = Meeting(model)
        self._states = States(self.solo.new_cache)

    def end(self) -> None:
        """Leave the model as it was."""
        self._meeting.end()

    def run(
        self,
        plan: Plan,
        batch: Batch,
        *,
        prepare: PrepareStep,
        packed: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        wanted: list[list[int]] = [[] for _ in plan.rows]
        for i in batch.sampling:
            wanted[i].append(plan.rows[i].count - 1)
        for i, _, count in batch.scored:
            wanted[i] += range(count)
        found = self.logits(plan, wanted, prepare)
        sampled = [found[i][:1] for i in batch.sampling]
        scored = [found[i][-count:] for i, _, count in batch.scored]
        return torch.cat([*sampled, *scored]) if sampled or scored else found[0]

    def logits(
        self, plan: Plan, wanted: Iterable[list[int]], prepare: PrepareStep
    ) -> list[torch.Tensor]:
        """[len(wanted), vocab] a row: after some of its tokens, by their places in the row."""
        self._states.drop_ended()
        forwards = [partial(self._row, *pair) for pair in zip(plan.rows, wanted, strict=True)]
        step = _Step(plan, self._state, prepare)
        try:
            return self._meeting.run(forwards, step)
        finally:
            step.end()

    def _row(self, row: PlanRow, wanted: list[int]) -> torch.Tensor:
        held = self._states.at(row.sequence, row.start)
        held.computed = None
        logits = self.solo.logits(row.tokens, row.start, held.cache, wanted)
        held.computed = row.start + row.count
        return logits


class _Step:
    """What the linears of one step are told, and on how many threads its rows run."""

    def __init__(self, plan: Plan, state: StepState, prepare: PrepareStep) -> None:
        self._plan = plan
        self._state = state
        self._prepare = prepare
        self._found: dict[object, Step | None] = {}
        self._begun: set[int] = set()
        self._threads = torch.get_num_threads()

    def linear(self, there: list[int], counts: list[int], *, head: bool) -> None:
        torch.set_num_threads(self._threads)
        step = self._of(there, counts)
        if head:
            self._state.head = lambda _: step
        else:
            self._tell(step, sum(counts))

    def forward(self, index: int) -> None:
        """One token is too little work to share, and its bits must not depend on the others.

        What takes deltas beside linears is told of this row alone: an embedding, where a row
        begins, and experts anywhere.
        """
        count = self._plan.rows[index].count
        torch.set_num_threads(1 if count == 1 else self._threads)
        if index not in self._begun or self._state.mixtures:
            self._begun.add(index)
            self._tell(self._of([index], [count]), count)

    def _of(self, there: list[int], counts: list[int]) -> Step | None:
        key = (*there, *counts)
        if key not in self._found or not getattr(self._found[key], "valid", True):
            pairs = zip(there, counts, strict=True)
            rows = tuple(RowTerms(count, self._plan.terms.rows[i].terms) for i, count in pairs)
            self._found[key] = self._prepare(StepTerms(rows))
        return self._found[key]

    def _tell(self, step: Step | None, tokens: int) -> None:
        self._state.step, self._state.tokens = step, tokens  # all of a row's are its own, if few

    def end(self) -> None:
        """Leave everything as it was."""
        torch.set_num_threads(self._threads)
        self._state.step = self._state.head = self._state.tokens = None
