"""Prompt lookup: what may come next, as it came before in the same text, or as the caller foretold.

Guesses fill decode steps that have few rows: a row more costs little there, and where the model
draws what was guessed, its sequence is a token further. They change no token, only when it comes.
Integers and a rate; knows no tensors and no clock.
"""

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from fader_server.core import PlanRow, Sequence
from fader_server.engine.blocks import BlockManager
from fader_server.engine.draft import Draft
from fader_server.engine.recall import Recall

_ROW_COST = 0.6
"""Of a row more in a step, in what a step costs before its first row: on two cores 0.4 with a base
of 1.1 billion parameters, 0.8 with one of 57 million."""
_FIRST_RATE = 0.7
_PATIENCE = 8
"""A rate is the mean of about so many guesses, the last ones."""
_FORGET = 0.003
"""A low rate rises by this where nothing is guessed, until something is."""


@dataclass(slots=True)
class _Memory:
    """Of one sequence."""

    recall: Recall
    rate: float = _FIRST_RATE
    """How often a guess after nothing but right ones was right, of late."""


class Lookup:
    """Owned by the engine thread, like the sequences it knows."""

    def __init__(self, *, rows: int, blocks: BlockManager, max_model_len: int) -> None:
        """rows: up to which guesses fill a step."""
        self._most = rows
        self._blocks = blocks
        self._max_model_len = max_model_len
        self._memories: WeakKeyDictionary[Sequence, _Memory] = WeakKeyDictionary()
        self.guessed = 0
        """Tokens that were computed as guesses, to be counted when their step is committed."""
        self.accepted = 0
        """Of those, the ones that came."""

    def may_fill(self, rows: int) -> bool:
        """Whether a step of so many rows has room for guesses."""
        return 0 < rows < self._most

    def fill(self, draft: Draft) -> None:
        """Add rows for guesses to a step of decode rows, the likeliest first, as long as the step
        is worth it by what it has of tokens for what it costs."""
        rows = len(draft.rows)
        if not self.may_fill(rows) or not all(row.sequence.decoding for row in draft.rows):
            return
        lines = [
            _Line(row.sequence, memory, guesses)
            for row in draft.rows
            for memory, guesses in [self._guesses(row.sequence, self._most - rows)]
            if guesses
        ]
        expected = float(rows)
        for count in range(rows, self._most):
            lines = [line for line in lines if len(line.taken) < len(line.guesses)]
            best = max(lines, key=lambda line: line.chance, default=None)
            if best is None or best.chance * (1 + _ROW_COST * count) < _ROW_COST * expected:
                break
            if not self._have_room(best.sequence, len(best.taken) + 1):
                lines.remove(best)
                continue
            expected += best.chance
            best.taken.append(best.guesses[len(best.taken)])
            draft.add_guess(best.sequence, tuple(best.taken))
        for line in lines:
            if not line.taken and line.memory.rate < _FIRST_RATE:
                line.memory.rate += _FORGET

    def came(self, row: PlanRow) -> bool:
        """Whether what a row took for granted came to pass, by what its sequence holds now. Once a
        row that was run, in order."""
        sequence = row.sequence
        after_the_last = row.start == sequence.computed
        right = after_the_last and sequence.tokens[-1] == row.guesses[-1]
        self.guessed += 1
        self.accepted += right
        if after_the_last:  # what follows a wrong one says nothing
            memory = self._memories[sequence]
            memory.rate += (right - memory.rate) / _PATIENCE
        return right

    def _guesses(self, sequence: Sequence, most: int) -> "tuple[_Memory, list[int]]":
        """What may follow, at most so many tokens, as far as the sequence may go on."""
        memory = self._memories.get(sequence)
        if memory is None:
            recall = Recall(sequence.request.prediction, sequence.prompt_len)
            memory = self._memories[sequence] = _Memory(recall)
        params, tokens = sequence.request.params, sequence.tokens
        most = min(
            most,
            params.max_tokens - sequence.output_len - 1,
            self._max_model_len - len(tokens) - 1,
        )
        if sequence.request.guide is not None or most <= 0:
            return memory, []
        return memory, memory.recall.next(tokens, most)

    def _have_room(self, sequence: Sequence, guesses: int) -> bool:
        """A block for the keys of so many guesses, of those that nobody has."""
        needed = self._blocks.blocks_for(len(sequence.tokens) + guesses)
        return needed <= len(sequence.blocks) or self._blocks.grow(sequence)


@dataclass(slots=True)
class _Line:
    """What may follow one sequence, and what of it is in the step."""

    sequence: Sequence
    memory: _Memory
    guesses: list[int]
    taken: list[int] = field(default_factory=list)

    @property
    def chance(self) -> float:
        """That the next guess counts: all before it and itself."""
        return self.memory.rate ** (len(self.taken) + 1)
