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
        self._rows: list[PlanRow] = []
        self._terms: list[RowTerms] = []

    @property
    def empty(self) -> bool:
        """No row is in it."""
        return not self._rows

    def add_token(self, sequence: Sequence) -> None:
        """The row of a sequence that decodes."""
        self._rows.append(PlanRow(sequence, sequence.computed, 1, True))
        self._terms.append(sequence.terms)
        self.room -= 1

    def add_chunk(self, sequence: Sequence) -> None:
        """The next chunk of a sequence in prefill, if there is room for all of it."""
        start = sequence.computed
        count = self.chunk(sequence, start)
        if count > self.room:
            return
        last = start + count == len(sequence.tokens)
        samples = last and sequence.request.params.max_tokens > 0
        self._rows.append(PlanRow(sequence, start, count, samples))
        self._terms.append(RowTerms(count, sequence.terms.terms))
        self.room -= count

    def chunk(self, sequence: Sequence, start: int) -> int:
        """Tokens of the chunk from `start`: to a multiple of chunk_size, or the prompt's end."""
        size = self._chunk_size
        end = min((start // size + 1) * size, len(sequence.tokens))
        prompt_len = sequence.prompt_len
        if start < prompt_len:
            return self._to_a_block(start, min(end, prompt_len), prompt_len)
        return 1 if self._solo else end - start

    def _to_a_block(self, start: int, end: int, prompt_len: int) -> int:
        """Tokens from `start`: a long last chunk ends on a block, but for its last few."""
        if self._block and end == prompt_len and end - start > _LEAST:
            end = (end - 1) // self._block * self._block
        return end - start

    def plan(self) -> Plan | None:
        """None without any row."""
        if not self._rows:
            return None
        return Plan(tuple(self._rows), StepTerms(tuple(self._terms)), tuple(self.uploads))
