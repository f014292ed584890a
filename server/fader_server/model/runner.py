"""Runs one plan on the device: batch, forward, sample. Decides nothing, keeps no requests."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import groupby

import torch

from fader_adapters.kernels.backend import Step
from fader_adapters.kernels.tables import Tables
from fader_adapters.spec import StepTerms
from fader_adapters.step_state import LaneWeights
from fader_server.core import Lane, Plan, RowResult
from fader_server.model.attention import PagedAttention, StepAttention
from fader_server.model.batch import Batch
from fader_server.model.decode import LeadingReplays, Replays, decodes
from fader_server.model.kernels import choose_replays
from fader_server.model.kv_cache import KVCache
from fader_server.model.loaded import LoadedBase
from fader_server.model.prefill import NativeReplays
from fader_server.model.sampler import Drawn, Sampler
from fader_server.model.screening import screening

HeadStep = Callable[[torch.Size], Step | None]
Ready = Callable[[], Drawn]
"""A forward that was put together: computes it, or sets the device to it, once."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Weights:
    """What one forward runs over, and its decode steps as they were recorded."""

    lane: LaneWeights | None
    replays: Replays | None


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """The rows of one forward."""

    plan: Plan
    places: Sequence[int]
    """Where they stand in the step."""
    weights: _Weights

    @property
    def replays(self) -> Replays | None:
        """The recorded steps that take them: then beginning one costs the host next to nothing."""
        replays = self.weights.replays
        return replays if replays is not None and replays.takes(self.plan) else None


def apart(plan: Plan, together: int) -> Iterator[Plan]:
    """The plan's rows in order, those of one token and longer ones in plans of their own; of the
    former `together` in one at most."""
    every = zip(plan.rows, plan.terms.rows, strict=True)
    for longer, group in groupby(every, lambda row: row[0].count > 1):
        found = list(group)
        size = len(found) if longer else together
        for start in range(0, len(found), size):
            rows, terms = zip(*found[start : start + size], strict=True)
            yield Plan(rows, StepTerms(terms))


def in_order(found: Iterable[tuple[Sequence[int], Sequence[RowResult]]]) -> list[RowResult]:
    """The results of a step from those of its forwards and the places of their rows."""
    placed = {i: result for places, rows in found for i, result in zip(places, rows, strict=True)}
    return [placed[i] for i in range(len(placed))]


class ModelRunner:
    """The device side of a step. Every method runs on the engine thread."""

    def __init__(
        self,
        base: LoadedBase,
        *,
        cache: KVCache,
        tables: Tables,
        attention: PagedAttention,
        sampler: Sampler,
    ) -> None:
        self._base = base
        self._cache = cache
        self._tables = tables
        self._attention = attention
        self._sampler = sampler
        self._replays = choose_replays(
            base, cache=cache, attention=attention, tables=tables, forward=self._rows
        )
        self._lanes: dict[Lane, _Weights] = {}

    @property
    def keeps_states(self) -> bool:
        """Whether rows leave more behind than keys and values."""
        return self._base.keeps_states

    @property
    def learns(self) -> bool:
        """Whether steps are recorded as they come, so that later ones are quicker."""
        return isinstance(self._replays, NativeReplays)

    def add_lane(self, lane: Lane, weights: LaneWeights) -> None:
        """Rows of this lane may come from now on."""
        replays = None if self._replays is None else self._replays.sibling(weights)
        self._lanes[lane] = _Weights(weights, replays)

    def drop_lane(self, lane: Lane) -> object:
        """No row of this lane comes any more. Whoever lets go of the result frees the memory."""
        return self._lanes.pop(lane)

    def run(self, plan: Plan) -> list[RowResult]:
        """Compute every row; one result a row, in order. KV writes are repeatable."""
        with torch.inference_mode():
            return in_order((part.places, self._begin(part).wait()) for part in self._parts(plan))

    def _parts(self, plan: Plan) -> Iterator[Part]:
        """The forwards of a step: one for the rows of each lane, in the order of first rows."""
        together = self._base.backend.together
        if together is not None and self._replays is None:
            together = len(plan.rows)
        parts = (plan,) if together is None else apart(plan, together)
        start = 0
        for part in parts:
            rows = range(start, start := start + len(part.rows))
            if self._lanes:
                yield from self._lane_parts(part, rows)
            else:
                yield Part(part, rows, _Weights(None, self._replays))

    def _lane_parts(self, plan: Plan, rows: range) -> Iterator[Part]:
        places: dict[Lane | None, list[int]] = {}
        for i, row in enumerate(plan.rows):
            places.setdefault(row.lane, []).append(i)
        for lane, own in places.items():
            terms = StepTerms(tuple(plan.terms.rows[i] for i in own))
            part = Plan(tuple(plan.rows[i] for i in own), terms)
            weights = _Weights(None, self._replays) if lane is None else self._lanes[lane]
            yield Part(part, [rows[i] for i in own], weights)

    def _begin(self, part: Part) -> Drawn:
        """Queue a forward and its draw; what waits for them."""
        return self._prepared(part)()

    def _prepared(self, part: Part, tokens: torch.Tensor | None = None) -> Ready:
        """Put a forward together; what queues it and its draw.

        tokens  [rows] int64, on the device: those of a decode step's rows, seen by nobody yet
        """
        replays = part.replays
        if replays is not None and not decodes(part.plan) and self._adapts_head(part.plan):
            replays = None  # a recorded output layer that is not for all tokens is the base's
        if replays is None:
            assert tokens is None
            compute = self._eager(part.plan)
        else:
            compute = self._replay(part.plan, replays, tokens)

        def begin() -> Drawn:
            state = self._base.installed.state
            state.lane = part.weights.lane
            try:
                with screening(self._base.screen, part.plan):
                    return compute()
            finally:
                state.lane = None

        return begin

    def _replay(self, plan: Plan, replays: Replays, tokens: torch.Tensor | None) -> Ready:
        step = self._base.backend.prepare(self._tables, plan.terms)

        head = step if decodes(plan) else None
        sampling = tuple(i for i, row in enumerate(plan.rows) if row.samples)

        def forward(batch: Batch) -> torch.Tensor:
            return self._forward(batch, step, lambda _: head)

        def compute() -> Drawn:
            if tokens is None:
                with self._under(step):
                    logits = replays.run(plan, step, forward)
                self._computed(plan)
                return self._sampled(plan, sampling, logits)
            assert isinstance(replays, LeadingReplays)
            logits = replays.run_ahead(plan, step, forward, tokens)
            return self._sampled(plan, sampling, logits)

        return compute

    @contextmanager
    def _under(self, step: Step | None) -> Iterator[None]:
        """What recorded forwards run as it is, such as experts' deltas, finds the step there."""
        state = self._base.installed.state
        state.step = step
        try:
            yield
        finally:
            state.step = None

    def _eager(self, plan: Plan) -> Ready:
        solo, backend, states = self._base.solo, self._base.backend, self._base.packed_states
        batch = Batch.from_plan(
            plan,
            block_size=self._cache.block_size,
            device=self._base.device,
            states=None if states is None else states.places,
        )
        step = backend.prepare(self._tables, plan.terms)

        def packed() -> torch.Tensor:
            return self._forward(batch, step, lambda _: self._head_step(plan, batch))

        def compute() -> Drawn:
            if solo is None:
                logits = packed()
                self._computed(plan)
            else:
                prepare = partial(backend.prepare, self._tables)
                logits = solo.run(plan, batch, prepare=prepare, packed=packed)
            return self._results(plan, batch, logits)

        return compute

    def _computed(self, plan: Plan) -> None:
        if self._base.packed_states is not None:
            self._base.packed_states.computed(plan)

    def _rows(self, batch: Batch, step: Step | None) -> torch.Tensor:
        """Where every token's logits are wanted, in order, the head's rows are the step's; it is
        the base's elsewhere."""
        head = step if len(batch.logit_index) == batch.tokens else None
        return self._forward(batch, step, lambda _: head)

    def _head_step(self, plan: Plan, batch: Batch) -> Step | None:
        """The delta work of the rows whose logits are wanted; None where nobody adapts the head."""
        if not self._adapts_head(plan):
            return None
        terms = batch.logit_terms(plan.terms)
        return self._base.backend.prepare(self._tables, terms)

    def _adapts_head(self, plan: Plan) -> bool:
        head = self._base.installed.head
        slots = sorted({slot for row in plan.terms.rows for slot, _ in row.terms})
        if head is None or not slots:
            return False
        (index,) = head.spec.linears
        return bool(self._tables.rank[slots, index].any())

    def _forward(self, batch: Batch, step: Step | None, head: HeadStep) -> torch.Tensor:
        """[len(batch.logit_index), vocab]"""
        state, states = self._base.installed.state, self._base.packed_states
        outer = state.step
        state.step, state.head, state.tokens = step, head, batch.input_ids.shape[1]
        keeping = nullcontext()
        if states is not None:
            assert batch.states is not None
            keeping = states.of(batch.states)
        try:
            with keeping:
                out = self._base.model(
                    input_ids=batch.input_ids,
                    position_ids=batch.position_ids,
                    use_cache=False,
                    logits_to_keep=batch.logit_index,
                    fader_step=StepAttention(self._attention, self._cache, batch),
                )
        finally:
            state.step = outer
            state.head = state.tokens = None
        return out.logits[0]

    def _sampled(self, plan: Plan, sampling: tuple[int, ...], logits: torch.Tensor) -> Drawn:
        """Results of every row; `sampling` are the rows that sample, in the order of `logits`."""
        rows = [plan.rows[i] for i in sampling]
        drawn = self._sampler.launch(logits[: len(rows)], rows)

        def results() -> list[RowResult]:
            found = [RowResult() for _ in plan.rows]
            for i, sample in zip(sampling, drawn.wait(), strict=True):
                found[i] = sample
            return found

        return Drawn(drawn.tokens, results)

    def _results(self, plan: Plan, batch: Batch, logits: torch.Tensor) -> Drawn:
        drawn = self._sampled(plan, batch.sampling, logits)
        if not batch.scored:
            return drawn
        return Drawn(drawn.tokens, lambda: self._scored(plan, batch, logits, drawn.wait()))

    @torch.inference_mode()
    def _scored(
        self, plan: Plan, batch: Batch, logits: torch.Tensor, results: list[RowResult]
    ) -> list[RowResult]:
        """The results with the prompt logprobs that rows want."""
        at = len(batch.sampling)
        for i, start, count in batch.scored:
            sequence = plan.rows[i].sequence
            targets = torch.tensor(sequence.tokens[start + 1 : start + 1 + count])
            span = logits[at : at + count]
            at += count
            scores = self._sampler.prompt_logprobs(
                span, targets, sequence.request.params.prompt_logprobs or 0
            )
            sound = not any(math.isnan(score.logprob) for score in scores)
            results[i] = dataclasses.replace(
                results[i], prompt_logprobs=scores, finite=results[i].finite and sound
            )
        return results
