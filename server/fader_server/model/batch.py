"""Turns a plan's integers into the tensors of one packed forward. Decides nothing."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fader_adapters.kernels.native import StateRows
from fader_adapters.spec import RowTerms, StepTerms
from fader_server.core import Plan, PlanRow
from fader_server.model.passage import packed

Places = Callable[[Plan], tuple[list[int], list[int]]]
"""Of each row the slot its state is in, and the one its next state goes to."""


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """One row's share of the packed step: queries [begin, begin+count) of a context."""

    begin: int
    count: int
    context: int
    """Keys it may see, its own included."""


@dataclass(frozen=True)
class Batch:
    """One packed step of R rows and T tokens.

    input_ids, position_ids  [1, T] int64
    slots         [T] int64, place of each token in a cache of [blocks · block_size] tokens
    cu_tokens     [R + 1] int32, where each row's tokens begin
    contexts      [R] int32, keys of each row, its new tokens included
    block_tables  [R, W] int32, padded with the null block
    logit_index   [S + P] int64, the packed tokens whose logits are wanted: one per sampling row,
                  then those of the prompt logprobs
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    slots: torch.Tensor
    cu_tokens: torch.Tensor
    contexts: torch.Tensor
    block_tables: torch.Tensor
    logit_index: torch.Tensor
    rows: tuple[AttentionRow, ...]
    sampling: tuple[int, ...]
    """Indices of the plan's rows that sample, in the order of their logits."""
    scored: tuple[tuple[int, int, int], ...]
    """(row, first position, positions) of each span of prompt logprobs, in the order of logits."""
    states: StateRows | None = None
    """Where rows' states lie, of a base whose layers keep some."""

    @property
    def tokens(self) -> int:
        return self.slots.shape[0]

    def logit_terms(self, terms: StepTerms) -> StepTerms:
        """The terms of the rows of `logit_index`."""
        rows = [RowTerms(1, terms.rows[i].terms) for i in self.sampling]
        rows += [RowTerms(count, terms.rows[i].terms) for i, _, count in self.scored]
        return StepTerms(tuple(rows))

    @classmethod
    def from_plan(
        cls, plan: Plan, *, block_size: int, device: torch.device, states: Places | None = None
    ) -> "Batch":
        """One copy to the device, in order on its current stream; the host does not wait.

        states: of a base whose layers keep some
        """
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[AttentionRow] = []
        cu_tokens = [0]
        for row in plan.rows:
            stop = row.start + row.count
            rows.append(AttentionRow(len(ids), row.count, stop))
            ids += row.tokens
            positions += range(row.start, stop)
            blocks = row.sequence.blocks
            slots += [
                blocks[p // block_size] * block_size + p % block_size
                for p in range(row.start, stop)
            ]
            cu_tokens.append(len(ids))
        sampling, scored, index = _logits(plan.rows, cu_tokens)
        arrays = (
            np.array([ids], np.int64),
            np.array([positions], np.int64),
            np.array(slots, np.int64),
            np.array(cu_tokens, np.int32),
            np.array([r.context for r in rows], np.int32),
            _block_tables(plan.rows, block_size),
            np.array(index, np.int64),
        )
        if states is not None:
            arrays += tuple(np.array(own, np.int32) for own in states(plan))
        sent = packed(arrays, device)
        tokens, places, written, starts, contexts, tables, wanted = sent[:7]
        kept = None if states is None else StateRows(starts, *sent[7:])
        return cls(
            input_ids=tokens,
            position_ids=places,
            slots=written,
            cu_tokens=starts,
            contexts=contexts,
            block_tables=tables,
            logit_index=wanted,
            rows=tuple(rows),
            sampling=sampling,
            scored=scored,
            states=kept,
        )


def _block_tables(rows: tuple[PlanRow, ...], block_size: int) -> np.ndarray:
    used = [-(-(row.start + row.count) // block_size) for row in rows]
    width = max(used)
    return np.array(
        [row.sequence.blocks[:n] + [0] * (width - n) for row, n in zip(rows, used, strict=True)],
        np.int32,
    )


def _logits(
    rows: tuple[PlanRow, ...], cu_tokens: list[int]
) -> tuple[tuple[int, ...], tuple[tuple[int, int, int], ...], list[int]]:
    sampling = tuple(i for i, row in enumerate(rows) if row.samples)
    index = [cu_tokens[i + 1] - 1 for i in sampling]
    scored: list[tuple[int, int, int]] = []
    for i, row in enumerate(rows):
        if not row.wants_prompt_logprobs:
            continue
        # position p is predicted by the logits of p - 1, so the prompt's last token scores nothing
        count = min(row.start + row.count, row.sequence.prompt_len - 1) - row.start
        if count > 0:
            scored.append((i, row.start, count))
            index += range(cu_tokens[i], cu_tokens[i] + count)
    return sampling, tuple(scored), index
