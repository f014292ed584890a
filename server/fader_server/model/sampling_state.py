"""What a batch of sequences asks of the sampler, as arrays on the host; no tensors here.

Some models read more tokens than they can write: of tokens beyond `vocab`, the width of the logits,
nothing is asked.

Penalty counts follow Sequence.tokens, O(1) a token, and live only while their rows keep coming.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fader_server.core import PlanRow, SamplingParams, Sequence
from fader_server.errors import EngineFault
from fader_server.model.gumbel import draw_key
from fader_server.model.mass import Limits


def masks_stops(row: PlanRow) -> bool:
    """Whether stop tokens are still forbidden."""
    sequence, params = row.sequence, row.sequence.request.params
    return sequence.output_len + row.unseen < params.min_tokens and bool(params.stop_token_ids)


def edits(row: PlanRow) -> bool:
    """Whether the row's logits must be changed before a token is chosen."""
    params = row.sequence.request.params
    return bool(params.logit_bias) or params.penalises or masks_stops(row) or guides(row.sequence)


def row_key(row: PlanRow) -> int:
    """What decides the row's next token where it is drawn."""
    sequence = row.sequence
    return draw_key(sequence.request.params.seed, sequence.output_len + row.unseen)


def guides(sequence: Sequence) -> bool:
    """Whether a guide says which tokens may come next."""
    return sequence.request.guide is not None


def limits(params: list[SamplingParams]) -> Limits:
    """Truncation of the given rows."""
    return Limits(
        top_k=np.array([p.top_k for p in params], np.int64),
        top_p=np.array([p.top_p for p in params], np.float64),
        min_p=np.array([p.min_p for p in params], np.float64),
    )


class TokenCounts:
    """The distinct tokens of one sequence and how often each was put out."""

    def __init__(self, sequence: Sequence) -> None:
        self._source = sequence.tokens  # the list itself: its identity says whose counts these are
        self._prompt_len = sequence.prompt_len
        seen = np.unique(np.asarray(sequence.request.prompt, np.int64))
        self._ids = np.zeros(max(64, 2 * seen.size), np.int64)
        self._counts = np.zeros_like(self._ids)
        self._ids[: seen.size] = seen
        self._at = {token: index for index, token in enumerate(seen.tolist())}
        self._read = self._prompt_len

    def follows(self, sequence: Sequence) -> bool:
        """Whether these counts are this sequence's, and not ahead of it."""
        return (
            self._source is sequence.tokens
            and self._prompt_len == sequence.prompt_len
            and self._read <= len(sequence.tokens)
        )

    def update(self) -> None:
        """Read the tokens that came since."""
        for position in range(self._read, len(self._source)):
            token = self._source[position]
            index = self._at.setdefault(token, len(self._at))
            if index == self._ids.size:
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[index] = token
            self._counts[index] += 1
        self._read = len(self._source)

    def arrays(self, guesses: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Distinct token ids [n] and their output counts [n]; 0 for a token of the prompt only.

        guesses: put out after those that were read
        """
        size = len(self._at)
        ids, counts = self._ids[:size], self._counts[:size]
        if not guesses:
            return ids, counts
        fresh = [token for token in dict.fromkeys(guesses) if token not in self._at]
        at = self._at | {token: size + i for i, token in enumerate(fresh)}
        ids = np.concatenate([ids, np.array(fresh, np.int64)])
        counts = np.concatenate([counts, np.zeros(len(fresh), np.int64)])
        np.add.at(counts, [at[token] for token in guesses], 1)
        return ids, counts


class CountsTable:
    """Counts of the rows of the last batch; a row that stays away is counted anew when it returns.

    Holds token lists, never sequences or requests: an idle sampler keeps no adapter alive.
    """

    def __init__(self) -> None:
        self._rows: dict[int, TokenCounts] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def refresh(self, sequences: list[Sequence]) -> list[TokenCounts]:
        """Counts of these sequences, up to date and in order; every other one is forgotten."""
        fresh: dict[int, TokenCounts] = {}
        for sequence in sequences:
            if id(sequence.tokens) in fresh:
                continue
            counts = self._rows.get(id(sequence.tokens))
            if counts is None or not counts.follows(sequence):
                counts = TokenCounts(sequence)
            counts.update()
            fresh[id(sequence.tokens)] = counts
        self._rows = fresh
        return [fresh[id(sequence.tokens)] for sequence in sequences]


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalised (row, token) pairs, each once. Arrays [N]."""

    row: np.ndarray
    token: np.ndarray
    repetition: np.ndarray
    """float32; divides a positive logit, multiplies another."""
    subtract: np.ndarray
    """float32; presence + count · frequency for tokens put out, else 0."""


def penalties(
    places: list[int], rows: list[PlanRow], counts: list[TokenCounts], vocab: int
) -> Penalties:
    """Pairs of the given rows, which stand at `places`; tokens of the prompt count for the
    repetition penalty only."""
    columns: list[tuple[np.ndarray, ...]] = []
    for place, row, count in zip(places, rows, counts, strict=True):
        params = row.sequence.request.params
        token, times = count.arrays(row.guesses)
        keep = token < vocab
        if params.repetition_penalty == 1.0:
            keep &= times > 0
        token, times = token[keep], times[keep]
        subtract = params.presence_penalty * (times > 0) + params.frequency_penalty * times
        repetition = np.full(token.size, params.repetition_penalty, np.float32)
        columns.append((np.full(token.size, place), token, repetition, subtract.astype(np.float32)))
    return Penalties(*(np.concatenate(column) for column in zip(*columns, strict=True)))


@dataclass(frozen=True, slots=True)
class Shifts:
    """Values added to (row, token) pairs, each once; -inf forbids. Arrays [N]."""

    row: np.ndarray
    token: np.ndarray
    value: np.ndarray


def biases(rows: list[PlanRow], vocab: int) -> Shifts | None:
    """The rows' logit biases."""
    return _shifts(rows, vocab, lambda row: dict(row.sequence.request.params.logit_bias))


def stop_masks(rows: list[PlanRow], vocab: int) -> Shifts | None:
    """The stop tokens still forbidden. For rows without a guide: of the others `permits` knows
    it."""

    def masked(row: PlanRow) -> dict[int, float]:
        if guides(row.sequence) or not masks_stops(row):
            return {}
        return dict.fromkeys(row.sequence.request.params.stop_token_ids, -np.inf)

    return _shifts(rows, vocab, masked)


def _shifts(
    rows: list[PlanRow], vocab: int, values: Callable[[PlanRow], dict[int, float]]
) -> Shifts | None:
    found = [
        (place, token, value)
        for place, row in enumerate(rows)
        for token, value in values(row).items()
        if token < vocab
    ]
    if not found:
        return None
    row, token, value = zip(*found, strict=True)
    return Shifts(np.array(row, np.int64), np.array(token, np.int64), np.array(value, np.float32))


@dataclass(frozen=True, slots=True)
class Permits:
    """What guides allow."""

    row: np.ndarray
    """[G] int64, of the rows with a guide."""
    bits: np.ndarray
    """[G, ceil(V / 8)] uint8, lowest bit first; a token whose bit is 0 is forbidden."""
    faults: dict[int, EngineFault]
    """Of rows whose guide failed: all tokens are forbidden there."""


def permits(rows: list[PlanRow], vocab: int) -> Permits | None:
    """The tokens that the rows' guides allow; None without a guide."""
    places = [place for place, row in enumerate(rows) if guides(row.sequence)]
    if not places:
        return None
    bits = np.zeros((len(places), -(-vocab // 8)), np.uint8)
    faults: dict[int, EngineFault] = {}
    for place, own in zip(places, bits, strict=True):
        try:
            _permit(rows[place], own)
        except EngineFault as fault:
            faults[place] = fault
    return Permits(np.array(places, np.int64), bits, faults)


def _permit(row: PlanRow, bits: np.ndarray) -> None:
    """Stop tokens that are still forbidden may all the same where nothing else may: an output that
    must end does, whatever min_tokens says."""
    guide = row.sequence.request.guide
    assert guide is not None
    allowed = np.frombuffer(guide.allowed(), np.uint8)[: bits.size]
    bits[: allowed.size] = allowed
    if masks_stops(row):
        for token in row.sequence.request.params.stop_token_ids:
            if token >> 3 < bits.size:
                bits[token >> 3] &= ~np.uint8(1 << (token & 7))
        if not bits.any():
            bits[: allowed.size] = allowed
