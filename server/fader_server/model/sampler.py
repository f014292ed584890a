"""Chooses tokens from logits, one host synchronisation a step. Knows nothing of caches or text.

A row's result depends on its own logits, parameters, seed and position only, bit for bit:
randomness is a hash, edits are elementwise, and what is said of whole rows keeps to that.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fader_server.core import PlanRow, RowResult, Sequence, TokenLogprob
from fader_server.errors import EngineFault
from fader_server.model.distribution import Distributions, Draws, TorchDistributions, uploaded
from fader_server.model.passage import to_host
from fader_server.model.sampling_state import (
    CountsTable,
    Permits,
    Shifts,
    TokenCounts,
    biases,
    edits,
    guides,
    limits,
    penalties,
    permits,
    row_key,
    stop_masks,
)


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """What the device was told to draw."""

    tokens: Tensor
    """[R] int64 on the device, one of each row that samples, in order."""
    wait: Callable[[], list[RowResult]]
    """Waits for the device and tells, one result a row; called once."""


_COLDEST = float(np.finfo(np.float32).tiny)
"""Nothing is divided by less: 0 / 0 would be no number."""
_LARGEST = float(np.finfo(np.float32).max)


class Sampler:
    """Owned by the engine thread. Keeps token counts of penalised rows between steps."""

    def __init__(self, distributions: Distributions | None = None) -> None:
        """distributions: None takes tensors, on whichever device they lie."""
        self._rows = distributions or TorchDistributions()
        self._counts = CountsTable()

    @property
    def tracked(self) -> int:
        """Rows whose token counts are held."""
        return len(self._counts)

    def sample(self, logits: Tensor, sequences: list[Sequence]) -> list[RowResult]:
        """What `launch` leads to, waited for."""
        rows = [PlanRow(s, len(s.tokens) - 1, 1, samples=True) for s in sequences]
        return self.launch(logits, rows).wait()

    @torch.inference_mode()
    def launch(self, logits: Tensor, rows: Many[PlanRow]) -> Drawn:
        """One token per row: the device's work is queued, the result waits for it.

        rows: those that sample. One that penalises or has a guide follows no tokens but its
        sequence's and its own guesses.

        logits: [R, V], any float dtype, untouched; row i belongs to rows[i]. Greedy takes the
        lowest id among equals. Order of edits: bias, repetition, presence and frequency, stop mask,
        guide; then temperature, top-k, top-p, min-p. Logprobs are of the logits as given. A row
        with NaN, +Inf or no finite logit comes back with token None and finite False, one whose
        guide failed with its fault.
        """
        assert logits.shape[0] == len(rows)
        if not rows:
            return Drawn(logits.new_empty(0, dtype=torch.int64), list)
        assert all(row.unseen <= len(row.guesses) or not _follows(row) for row in rows)
        counts = self._counts.refresh([row.sequence for row in rows if _penalises(row)])
        best, tokens = self._rows.largest(logits)
        finite = best.isfinite()
        edited = [i for i, row in enumerate(rows) if edits(row)]
        apart = set(edited)
        plain = {i: row for i, row in enumerate(rows) if i not in apart}
        tokens = self._redrawn(logits, tokens, plain)
        faults: dict[int, EngineFault] = {}
        if edited:
            index = uploaded(edited, logits)
            changed = [rows[i] for i in edited]
            x = logits.index_select(0, index).float()
            permitted = _edit(x, changed, counts)
            if permitted is not None:
                faults = {edited[row]: fault for row, fault in permitted.faults.items()}
            chosen, sound = self._choose(x, changed)
            tokens = tokens.index_copy(0, index, chosen)
            finite = finite.index_copy(0, index, finite.index_select(0, index) & sound)
        drawn = self._drawn(logits, rows, tokens, finite)
        return Drawn(drawn.tokens, lambda: _with_faults(drawn.wait(), faults)) if faults else drawn

    def _choose(self, x: Tensor, rows: Many[PlanRow]) -> tuple[Tensor, Tensor]:
        """Token [R] of every row of x [R, V], and whether it has a finite maximum [R]."""
        best, chosen = self._rows.largest(x)
        return self._redrawn(x, chosen, dict(enumerate(rows))), best.isfinite()

    def _redrawn(self, logits: Tensor, tokens: Tensor, rows: dict[int, PlanRow]) -> Tensor:
        """tokens [R], but drawn in those of `rows`, by their numbers, that are not greedy."""
        random = {i: r for i, r in rows.items() if r.sequence.request.params.temperature > 0}
        if not random:
            return tokens
        index = uploaded(list(random), logits)
        return tokens.index_copy(
            0, index, self._rows.draw(logits, index, _draws([*random.values()]))
        )

    def _drawn(self, logits: Tensor, rows: Many[PlanRow], tokens: Tensor, finite: Tensor) -> Drawn:
        """Everything to the host in one transfer, then plain values."""
        asked = [row.sequence.request.params.logprobs for row in rows]
        scored = [row for row, count in enumerate(asked) if count is not None]
        parts = [tokens.double(), finite.double()]
        if scored:
            index = uploaded(scored, logits)
            top_n = max(count for count in asked if count is not None)
            scores = self._rows.score(logits, index, tokens.index_select(0, index), top_n)
            parts.append(scores.reshape(-1))
        on_its_way = to_host(torch.cat(parts))
        return Drawn(tokens, lambda: _results(on_its_way(), asked))

    @torch.inference_mode()
    def prompt_logprobs(
        self, logits: Tensor, targets: Tensor, top_n: int
    ) -> tuple[TokenLogprob, ...]:
        """Logprob of targets[i] under logits[i], with the top_n likeliest. One synchronisation.

        logits: [n, V], any float dtype. targets: [n] int64; the logprob of one that has no logit is
        -inf. Rows that are not finite give NaN.
        """
        if not len(targets):
            return ()
        width = logits.shape[1]
        ids = targets.to(logits.device)
        rows = torch.arange(len(ids), device=logits.device)
        scored = self._rows.score(logits, rows, ids.clamp(max=width - 1), top_n)
        found = zip(ids.tolist(), scored.tolist(), strict=True)
        return tuple(_prompt_logprob(token, values, top_n, width) for token, values in found)


def _penalises(row: PlanRow) -> bool:
    return row.sequence.request.params.penalises


def _follows(row: PlanRow) -> bool:
    """Whether what may come depends on which tokens came."""
    return _penalises(row) or guides(row.sequence)


def _draws(rows: list[PlanRow]) -> Draws:
    """How the next tokens of these rows are drawn."""
    params = [row.sequence.request.params for row in rows]
    heat = np.array([p.temperature for p in params], np.float32).clip(min=_COLDEST)
    return Draws(heat, limits(params), np.array([row_key(row) for row in rows], np.int64))


def _edit(x: Tensor, rows: list[PlanRow], counts: list[TokenCounts]) -> Permits | None:
    """Change logits x [R, V] float32 as their rows ask; what guides allowed. `counts`: of the rows
    that penalise, in order."""
    vocab = x.shape[1]
    _add(x, biases(rows, vocab))
    if counts:
        counted = [i for i, row in enumerate(rows) if _penalises(row)]
        pairs = penalties(counted, [rows[row] for row in counted], counts, vocab)
        _penalise(x, pairs.row, pairs.token, pairs.repetition, pairs.subtract)
    _add(x, stop_masks(rows, vocab))
    permitted = permits(rows, vocab)
    if permitted is not None:
        _forbid(x, permitted)
    return permitted


def _penalise(
    x: Tensor, row: np.ndarray, token: np.ndarray, repetition: np.ndarray, subtract: np.ndarray
) -> None:
    """Finite logits stay finite, so that the row is not taken for one with a fault."""
    at = (uploaded(row, x), uploaded(token, x))
    factor = uploaded(repetition, x)
    seen = x[at]
    changed = torch.where(seen > 0, seen / factor, seen * factor) - uploaded(subtract, x)
    x[at] = torch.where(seen.isfinite(), changed.clamp(-_LARGEST, _LARGEST), changed)


def _add(x: Tensor, shifts: Shifts | None) -> None:
    if shifts is not None:
        at = (uploaded(shifts.row, x), uploaded(shifts.token, x))
        x[at] = x[at] + uploaded(shifts.value, x)


def _forbid(x: Tensor, permitted: Permits) -> None:
    """-inf where a guide does not allow a token. Looked up by the byte: on a CPU filling by a mask
    takes eight times as long."""
    places = torch.arange(8, device=x.device)
    closed = (torch.arange(256, device=x.device)[:, None] >> places) & 1 == 0
    by_byte = torch.where(closed, -torch.inf, 0.0)  # [256, 8]
    bits = uploaded(permitted.bits, x)
    shifts = by_byte.index_select(0, bits.flatten().int()).view(len(bits), -1)
    x.index_add_(0, uploaded(permitted.row, x), shifts[:, : x.shape[1]])


def _with_faults(results: list[RowResult], faults: Mapping[int, EngineFault]) -> list[RowResult]:
    return [
        RowResult(fault=faults[row]) if row in faults else result
        for row, result in enumerate(results)
    ]


def _logprob(token: int, values: list[float], top_n: int) -> TokenLogprob:
    """From a row of Distributions.score for at least top_n tokens."""
    width = (len(values) - 1) // 2
    ids = [int(value) for value in values[1 : 1 + min(top_n, width)]]
    return TokenLogprob(token, values[0], tuple(zip(ids, values[1 + width :], strict=False)))


def _prompt_logprob(token: int, values: list[float], top_n: int, width: int) -> TokenLogprob:
    """Of a row of scores; `width`: how many tokens have a logit."""
    if token >= width and not math.isnan(values[0]):
        values = [-math.inf, *values[1:]]
    return _logprob(token, values, top_n)


def _results(values: list[float], asked: list[int | None]) -> list[RowResult]:
    """Of tokens, soundness and scores, one after the other; asked: top logprobs wanted by row."""
    scored = [row for row, count in enumerate(asked) if count is not None]
    size = len(asked)
    width = (len(values) - 2 * size) // max(1, len(scored))
    rows = _slices(values[2 * size :], width)
    results = []
    for row, count in enumerate(asked):
        token, sound = int(values[row]), bool(values[size + row])
        scores = next(rows) if count is not None else []
        if not sound:
            results.append(RowResult(token=None, finite=False))
        else:
            logprob = _logprob(token, scores, count) if count is not None else None
            results.append(RowResult(token=token, logprob=logprob))
    return results


def _slices(values: list[float], width: int) -> Iterator[list[float]]:
    return (values[start : start + width] for start in range(0, len(values), max(1, width)))
