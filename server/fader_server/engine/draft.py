"""A plan in the making. Integers only."""

from fader_adapters.spec import RowTerms, StepTerms, Upload
from fader_server.core import Plan, PlanRow, Sequence
from fader_server.engine.limits import Limits

_LEAST = 128
"""Tokens, at least a block, that are computed again rather than in a step more."""


class Draft:
    """Rows of the next step, the delta work of each, and the tokens for which there is room."""

    def __init__(self, limits: Limits) -> None:
        self.room = limits.max_step_tokens
        self.uploads: list[Upload] = []
        self._chunk_size = limits.chunk_size
        self._solo = limits.solo
        self._block = limits.block
        self.rows: list[PlanRow] = []
        self._terms: list[RowTerms] = []

    @property
    def empty(self) -> bool:
        """No row is in it."""
        return not self.rows

    def add_token(self, sequence: Sequence) -> None:
        """The row of a sequence that decodes."""
        self.rows.append(PlanRow(sequence, sequence.computed, 1, True))
        self._terms.append(sequence.terms[-1])
        self.room -= 1

    def add_guess(self, sequence: Sequence, guesses: tuple[int, ...]) -> None:
        """One row more of a sequence that decodes, for the last of these tokens."""
        self.rows.append(PlanRow(sequence, sequence.computed + len(guesses), 1, True, guesses))
        self._terms.append(sequence.terms[-1])
        self.room -= 1

    def add_chunk(self, sequence: Sequence) -> None:
        """The next chunk of a sequence in prefill, if there is room for all of it."""
        start = sequence.computed
        count = self.chunk(sequence, start)
        if count > self.room:
            return
        last = start + count == len(sequence.tokens)
        samples = last and sequence.request.params.max_tokens > 0
        self.rows.append(PlanRow(sequence, start, count, samples))
        terms = sequence.terms[sequence.phase_at(start)].terms
        self._terms.append(RowTerms(count, terms))
        self.room -= count

    def chunk(self, sequence: Sequence, start: int) -> int:
        """Tokens of the chunk from `start`: to a multiple of chunk_size, or the end of its phase or
        of the prompt."""
        size = self._chunk_size
        end = min((start // size + 1) * size, len(sequence.tokens))
        if start >= sequence.prompt_len:
            return 1 if self._solo else end - start
        phases = sequence.request.phases[sequence.phase_at(start) + 1 :]
        if phases:
            return self._to_a_block(start, end, phases[0].start, phases[0].start)
        return self._to_a_block(start, end, sequence.prompt_len, sequence.prompt_len - 1)

    def _to_a_block(self, start: int, end: int, last: int, kept: int) -> int:
        """Tokens from `start` to `end`, or `last` if that is before: a long chunk up to there ends
        on a block, that of the first `kept` tokens, but for its last few."""
        if end < last:
            return end - start
        end = last
        if self._block and end - start > _LEAST:
            end = kept // self._block * self._block
        return end - start

    def plan(self) -> Plan | None:
        """None without any row."""
        if not self.rows:
            return None
        return Plan(tuple(self.rows), StepTerms(tuple(self._terms)), tuple(self.uploads))
