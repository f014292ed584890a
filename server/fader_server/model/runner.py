"""Runs one plan on the device: batch, forward, sample. Decides nothing, keeps no requests."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby

import torch

from fader_adapters.kernels.backend import BaseLinear, Step
from fader_adapters.kernels.tables import Tables
from fader_adapters.layers import Site
from fader_adapters.spec import RowTerms, StepTerms
from fader_server.core import Lane, Plan, RowResult
from fader_server.model.attention import PagedAttention, StepAttention
from fader_server.model.batch import Batch
from fader_server.model.decode import Replays
from fader_server.model.kernels import choose_replays
from fader_server.model.kv_cache import KVCache
from fader_server.model.loader import LoadedBase
from fader_server.model.sampler import Sampler, prompt_logprobs

HeadStep = Callable[[torch.Size], Step | None]


def _padded(terms: StepTerms, padding: int) -> StepTerms:
    """The terms of every packed token: padding is a row of the base."""
    return StepTerms((*terms.rows, RowTerms(padding))) if padding else terms


LaneBases = Mapping[Site, BaseLinear]
"""Weights of the sites that a lane changes."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Weights:
    """What one forward runs over, and its decode steps as they were recorded."""

    bases: LaneBases | None
    replays: Replays | None


def apart(plan: Plan) -> Iterator[Plan]:
    """The plan's rows in order, those of one token and longer ones in plans of their own."""
    for _, group in groupby(zip(plan.rows, plan.terms.rows, strict=True), lambda r: r[0].count > 1):
        rows, terms = zip(*group, strict=True)
        yield Plan(rows, StepTerms(terms))


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

    def add_lane(self, lane: Lane, bases: LaneBases) -> None:
        """Rows of this lane may come from now on."""
        replays = None if self._replays is None else self._replays.sibling()
        self._lanes[lane] = _Weights(bases, replays)

    def drop_lane(self, lane: Lane) -> object:
        """No row of this lane comes any more. Whoever lets go of the result frees the memory."""
        return self._lanes.pop(lane)

    def run(self, plan: Plan) -> list[RowResult]:
        """Compute every row; one result a row, in order. KV writes are repeatable."""
        with torch.inference_mode():
            parts = apart(plan) if self._base.backend.apart else (plan,)
            return [result for part in parts for result in self._run_lanes(part)]

    def _run_lanes(self, plan: Plan) -> list[RowResult]:
        """One forward for the rows of each lane, in the order of their first rows."""
        if not self._lanes:
            return self._run(plan, _Weights(None, self._replays))
        places: dict[Lane | None, list[int]] = {}
        for i, row in enumerate(plan.rows):
            places.setdefault(row.lane, []).append(i)
        results = [RowResult()] * len(plan.rows)
        for lane, rows in places.items():
            terms = StepTerms(tuple(plan.terms.rows[i] for i in rows))
            part = Plan(tuple(plan.rows[i] for i in rows), terms)
            weights = _Weights(None, self._replays) if lane is None else self._lanes[lane]
            for i, result in zip(rows, self._run(part, weights), strict=True):
                results[i] = result
        return results

    def _run(self, plan: Plan, weights: _Weights) -> list[RowResult]:
        state = self._base.installed.state
        state.lane = weights.bases
        try:
            return self._computed(plan, weights.replays)
        finally:
            state.lane = None

    def _computed(self, plan: Plan, replays: Replays | None) -> list[RowResult]:
        if replays is not None and replays.takes(plan):
            step = self._base.backend.prepare(self._tables, plan.terms)
            logits = replays.run(plan, step, lambda batch: self._rows(batch, step))
            return self._sampled(plan, tuple(range(len(plan.rows))), logits)
        batch = Batch.from_plan(
            plan,
            block_size=self._cache.block_size,
            device=self._base.device,
            least=self._base.backend.least_rows,
        )
        terms = _padded(plan.terms, batch.padding)
        step = self._base.backend.prepare(self._tables, terms)
        logits = self._forward(batch, step, lambda _: self._head_step(plan, batch))
        return self._results(plan, batch, logits)

    def _rows(self, batch: Batch, step: Step | None) -> torch.Tensor:
        """Every token's logits are wanted, in order: the head's rows are the step's."""
        return self._forward(batch, step, lambda _: step)

    def _head_step(self, plan: Plan, batch: Batch) -> Step | None:
        """The delta work of the rows whose logits are wanted; None where nobody adapts the head."""
        head = self._base.installed.head
        slots = sorted({slot for row in plan.terms.rows for slot, _ in row.terms})
        if head is None or not slots:
            return None
        (index,) = head.spec.linears
        if not bool(self._tables.rank[slots, index].any()):
            return None
        terms = batch.logit_terms(plan.terms)
        return self._base.backend.prepare(self._tables, terms)

    def _forward(self, batch: Batch, step: Step | None, head: HeadStep) -> torch.Tensor:
        """[len(batch.logit_index), vocab]"""
        state = self._base.installed.state
        state.step, state.head, state.tokens = step, head, batch.input_ids.shape[1]
        try:
            out = self._base.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=batch.logit_index,
                fader_step=StepAttention(self._attention, self._cache, batch),
            )
        finally:
            state.step = state.head = state.tokens = None
        return out.logits[0]

    def _sampled(
        self, plan: Plan, sampling: tuple[int, ...], logits: torch.Tensor
    ) -> list[RowResult]:
        """Results of every row; `sampling` are the rows that sample, in the order of `logits`."""
        results = [RowResult() for _ in plan.rows]
        sequences = [plan.rows[i].sequence for i in sampling]
        if sequences:
            samples = self._sampler.sample(logits[: len(sequences)], sequences)
            for i, sample in zip(sampling, samples, strict=True):
                results[i] = sample
        return results

    def _results(self, plan: Plan, batch: Batch, logits: torch.Tensor) -> list[RowResult]:
        results = self._sampled(plan, batch.sampling, logits)
        at = len(batch.sampling)
        for i, start, count in batch.scored:
            sequence = plan.rows[i].sequence
            targets = torch.tensor(sequence.tokens[start + 1 : start + 1 + count])
            span = logits[at : at + count]
            at += count
            results[i] = dataclasses.replace(
                results[i],
                prompt_logprobs=prompt_logprobs(
                    span, targets.to(span.device), sequence.request.params.prompt_logprobs or 0
                ),
                finite=results[i].finite and bool(span.isfinite().all()),
            )
        return results
