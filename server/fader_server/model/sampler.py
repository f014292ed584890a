"""Chooses tokens from logits, one host synchronisation a step. Knows nothing of caches or text.

A row's result depends on its own logits, parameters, seed and position only, bit for bit: sums are
integers (mass.py), randomness is a hash, and everything else is elementwise or a maximum.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fader_server.core import RowResult, Sequence, TokenLogprob
from fader_server.errors import EngineFault
from fader_server.model.mass import draw, edges, likeliest, log_total, masses
from fader_server.model.passage import to_device, to_host
from fader_server.model.sampling_state import (
    CountsTable,
    Permits,
    Shifts,
    biases,
    edits,
    guides,
    limits,
    penalises,
    penalties,
    permits,
    stop_masks,
    truncates,
    uniform,
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
_CHUNK_ELEMENTS = 2**22
"""Logits worked on at a time for prompt logprobs: about 100 MB of temporaries."""


class Sampler:
    """Owned by the engine thread. Keeps token counts of penalised rows between steps."""

    def __init__(self) -> None:
        self._counts = CountsTable()

    @property
    def tracked(self) -> int:
        """Rows whose token counts are held."""
        return len(self._counts)

    def sample(self, logits: Tensor, sequences: list[Sequence]) -> list[RowResult]:
        """What `launch` leads to, waited for."""
        return self.launch(logits, sequences).wait()

    @torch.inference_mode()
    def launch(self, logits: Tensor, sequences: list[Sequence], *, unseen: int = 0) -> Drawn:
        """One token per row: the device's work is queued, the result waits for it.

        unseen: tokens of every row that were drawn and are not in its sequence yet. A row that
        `penalises` or `guides` must have none.

        logits: [R, V], any float dtype, untouched; row i belongs to sequences[i]. Greedy takes the
        lowest id among equals. Order of edits: bias, repetition, presence and frequency, stop mask,
        guide; then temperature, top-k, top-p, min-p. Logprobs are of the logits as given. A row
        with NaN, +Inf or no finite logit comes back with token None and finite False, one whose
        guide failed with its fault.
        """
        assert logits.shape[0] == len(sequences)
        if not sequences:
            return Drawn(logits.new_empty(0, dtype=torch.int64), list)
        assert not (unseen and any(penalises(s.request.params) or guides(s) for s in sequences))
        best, tokens = _largest(logits)
        finite = best.isfinite()
        touched = [
            row
            for row, sequence in enumerate(sequences)
            if sequence.request.params.temperature > 0 or edits(sequence, unseen)
        ]
        rows = [sequences[row] for row in touched]
        counted = [row for row, seq in enumerate(rows) if penalises(seq.request.params)]
        counts = self._counts.refresh([rows[row] for row in counted])
        permitted = permits(rows, logits.shape[1])
        if touched:
            index = _upload(touched, logits)
            x = logits.index_select(0, index).float()
            _add(x, biases(rows, logits.shape[1]))
            if counted:
                own = [rows[row] for row in counted]
                pairs = penalties(counted, own, counts, logits.shape[1])
                _penalise(x, pairs.row, pairs.token, pairs.repetition, pairs.subtract)
            _add(x, stop_masks(rows, logits.shape[1], unseen))
            if permitted is not None:
                _forbid(x, permitted)
            chosen, sound = _choose(x, rows, unseen)
            tokens = tokens.index_copy(0, index, chosen)
            finite = finite.index_copy(0, index, finite.index_select(0, index) & sound)
        drawn = _drawn(logits, sequences, tokens, finite)
        if permitted is None or not permitted.faults:
            return drawn
        faults = {touched[row]: fault for row, fault in permitted.faults.items()}
        return Drawn(drawn.tokens, lambda: _with_faults(drawn.wait(), faults))


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and its lowest index, [R] each; NaN where a row holds one."""
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        best, tokens = logits.max(-1)
        return best, tokens
    tokens = torch.from_numpy(logits.numpy().argmax(-1))  # numpy's is vectorised, torch's is not
    return logits.gather(1, tokens.unsqueeze(1)).squeeze(1), tokens


def prompt_logprobs(logits: Tensor, targets: Tensor, top_n: int) -> tuple[TokenLogprob, ...]:
    """Logprob of targets[i] under logits[i], with the top_n likeliest. One synchronisation a chunk.

    logits: [n, V], any float dtype. targets: [n] int64; the logprob of one that has no logit is
    -inf. Rows that are not finite give NaN.
    """
    width = logits.shape[1]
    step = max(1, _CHUNK_ELEMENTS // width)
    found: list[TokenLogprob] = []
    with torch.inference_mode():
        for start in range(0, len(targets), step):
            ids = targets[start : start + step].to(logits.device)
            scored = _score(logits[start : start + step].float(), ids.clamp(max=width - 1), top_n)
            for token, values in zip(ids.tolist(), scored.flat().tolist(), strict=True):
                chosen = values[0] if token < width else -math.inf
                found.append(_logprob(token, [chosen, *values[1:]], top_n))
    return tuple(found)


def _penalise(
    x: Tensor, row: np.ndarray, token: np.ndarray, repetition: np.ndarray, subtract: np.ndarray
) -> None:
    """Finite logits stay finite, so that the row is not taken for one with a fault."""
    at = (_upload(row, x), _upload(token, x))
    factor = _upload(repetition, x)
    seen = x[at]
    changed = torch.where(seen > 0, seen / factor, seen * factor) - _upload(subtract, x)
    x[at] = torch.where(seen.isfinite(), changed.clamp(-_LARGEST, _LARGEST), changed)


def _add(x: Tensor, shifts: Shifts | None) -> None:
    if shifts is not None:
        at = (_upload(shifts.row, x), _upload(shifts.token, x))
        x[at] = x[at] + _upload(shifts.value, x)


def _forbid(x: Tensor, permitted: Permits) -> None:
    """-inf where a guide does not allow a token. Looked up by the byte: on a CPU filling by a mask
    takes eight times as long."""
    places = torch.arange(8, device=x.device)
    closed = (torch.arange(256, device=x.device)[:, None] >> places) & 1 == 0
    by_byte = torch.where(closed, -torch.inf, 0.0)  # [256, 8]
    bits = _upload(permitted.bits, x)
    shifts = by_byte.index_select(0, bits.flatten().int()).view(len(bits), -1)
    x.index_add_(0, _upload(permitted.row, x), shifts[:, : x.shape[1]])


def _with_faults(results: list[RowResult], faults: Mapping[int, EngineFault]) -> list[RowResult]:
    return [
        RowResult(fault=faults[row]) if row in faults else result
        for row, result in enumerate(results)
    ]


def _choose(x: Tensor, sequences: list[Sequence], unseen: int) -> tuple[Tensor, Tensor]:
    """Token [R] of every row of x [R, V] float32, and whether the row has a finite maximum [R]."""
    best, chosen = x.max(-1)
    drawn = [row for row, seq in enumerate(sequences) if seq.request.params.temperature > 0]
    if drawn:
        index = _upload(drawn, x)
        rows = [sequences[row] for row in drawn]
        shifted = x.index_select(0, index).sub_(best.index_select(0, index)[:, None])
        chosen = chosen.index_copy(0, index, _draw(shifted, rows, unseen))
    return chosen, best.isfinite()


def _draw(shifted: Tensor, sequences: list[Sequence], unseen: int) -> Tensor:
    """A token per row of shifted [R, V] (row maximum 0, overwritten) under its own parameters."""
    params = [sequence.request.params for sequence in sequences]
    heat = np.array([p.temperature for p in params], np.float32).clip(min=_COLDEST)
    mass = masses(shifted.div_(_upload(heat, shifted)[:, None]))
    cut = [row for row, p in enumerate(params) if truncates(p)]
    if cut:
        index = _upload(cut, mass)
        kept = mass if len(cut) == len(params) else mass.index_select(0, index)
        kept.masked_fill_(kept < edges(kept, limits([params[row] for row in cut])), 0)
        mass = kept if kept is mass else mass.index_copy_(0, index, kept)
    numbers = [uniform(s.request.params.seed, s.output_len + unseen) for s in sequences]
    return draw(mass, _upload(np.array(numbers, np.float64), mass)[:, None])


@dataclass(frozen=True, slots=True)
class _Scores:
    chosen: Tensor
    """[R] float64."""
    top_ids: Tensor
    """[R, n] int64, likeliest first."""
    top: Tensor
    """[R, n] float64."""

    def flat(self) -> Tensor:
        """[R, 1 + 2n] float64: chosen, ids, logprobs. Ids below 2^53 survive it."""
        return torch.cat([self.chosen[:, None], self.top_ids.double(), self.top], dim=-1)


def _score(x: Tensor, tokens: Tensor, top_n: int) -> _Scores:
    """Logprobs under x [R, V] float32 of tokens [R] and of the top_n likeliest."""
    best = x.amax(-1, keepdim=True)
    total = log_total(masses(x - best))[:, None]
    chosen = (x.gather(-1, tokens[:, None]) - best).double() - total
    ids = likeliest(x, top_n) if top_n else tokens.new_empty((len(tokens), 0))
    top = (x.gather(-1, ids) - best).double() - total
    return _Scores(chosen[:, 0], ids, top)


def _logprob(token: int, values: list[float], top_n: int) -> TokenLogprob:
    """From a row of _Scores.flat() computed for at least top_n tokens."""
    width = (len(values) - 1) // 2
    ids = [int(value) for value in values[1 : 1 + min(top_n, width)]]
    return TokenLogprob(token, values[0], tuple(zip(ids, values[1 + width :], strict=False)))


def _drawn(logits: Tensor, sequences: list[Sequence], tokens: Tensor, finite: Tensor) -> Drawn:
    """Everything to the host in one transfer, then plain values."""
    asked = [s.request.params.logprobs for s in sequences]
    scored = [row for row, count in enumerate(asked) if count is not None]
    parts = [tokens.double(), finite.double()]
    if scored:
        index = _upload(scored, logits)
        x = logits.index_select(0, index).float()
        top_n = max(count for count in asked if count is not None)
        parts.append(_score(x, tokens.index_select(0, index), top_n).flat().reshape(-1))
    on_its_way = to_host(torch.cat(parts))
    return Drawn(tokens, lambda: _results(on_its_way(), asked))


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


def _upload(values: np.ndarray | list[int], like: Tensor) -> Tensor:
    return to_device(np.ascontiguousarray(values), like.device)
