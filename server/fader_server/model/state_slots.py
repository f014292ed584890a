"""Where the states of sequences lie: of those that run, and of prefixes that others may go on
from. Integers and keys only.

A step reads a sequence's state from one slot and leaves the next in another, so that the same
step may be run again, or a smaller one that begins at the same token. A state that is kept stays
as it is: whoever goes on from it writes elsewhere, so keeping costs no copy.
"""

from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from fader_server.core import PlanRow, Sequence
from fader_server.errors import EngineFault

NOBODY = -1
"""The slot that a sequence's first tokens go on from."""
SPARE = 2
"""Slots that are nobody's, the first ones: for rows that are made up."""


@dataclass(slots=True)
class _Held:
    """A sequence's slots and how many of its tokens each stands for; None: of no use."""

    slots: list[int] = field(default_factory=lambda: [NOBODY, NOBODY])
    tokens: list[int | None] = field(default_factory=lambda: [None, None])
    newest: bytes | None = None
    """The state that it had kept last, if that is kept until there is a newer one only."""


class StateSlots:
    """Of the sequences that run, by identity, and of prefixes, by their keys."""

    def __init__(self) -> None:
        self.count = SPARE
        """Slots there are."""
        self.most = SPARE
        """Slots there may be before those that are kept make room, the longest unused first."""
        self._free: list[int] = []
        self._held: dict[Sequence, _Held] = {}
        self._kept: OrderedDict[bytes, int] = OrderedDict()
        self._users: dict[int, int] = {}
        """How many sequences and keys each slot has."""

    @property
    def kept(self) -> int:
        """States that can be found."""
        return len(self._kept)

    def places(self, rows: Many[PlanRow]) -> tuple[list[int], list[int]]:
        """Of each row the slot it goes on from and the one it leaves its state in.

        May be asked again until `computed`. Raises EngineFault when a state is not known.
        """
        self._drop_ended()
        came_from: list[int] = []
        to: list[int] = []
        for row in rows:
            held = self._held.get(row.sequence)
            if row.start == 0:
                if held is None:
                    held = self._held[row.sequence] = _Held()
                held.tokens = [None, None]
                came_from.append(NOBODY)
                to.append(self._own(held, 0))
            elif held is not None and row.start in held.tokens:
                at = held.tokens.index(row.start)
                held.tokens[1 - at] = None
                came_from.append(held.slots[at])
                to.append(self._own(held, 1 - at))
            else:
                raise EngineFault("the state of this sequence is not where its step begins")
        return came_from, to

    def computed(self, rows: Many[PlanRow]) -> None:
        """The states of these rows are there now."""
        for row in rows:
            held = self._held[row.sequence]
            at = 0 if row.start == 0 else 1 - held.tokens.index(row.start)
            held.tokens[at] = row.start + row.count

    def longest(self, keys: Many[bytes]) -> int:
        """How many of a prefix's blocks there are up to the last of whose end a state is kept."""
        return next((n for n in range(len(keys), 0, -1) if keys[n - 1] in self._kept), 0)

    def resume(self, sequence: Sequence, key: bytes, tokens: int) -> None:
        """The sequence goes on from the state of its first `tokens`, which is kept."""
        self._let_go(sequence)
        slot = self._kept[key]
        self._kept.move_to_end(key)
        self._users[slot] += 1
        self._held[sequence] = _Held([slot, NOBODY], [tokens, None])

    def keep(self, sequence: Sequence, key: bytes, blocks: int) -> None:
        """Have the state of all it has computed, so many whole blocks, found again.

        What lasts is the last of its prompt, for who asks the same or goes on from there, the last
        before each later phase, for who has another blend from there on, and powers of two blocks,
        for who has a beginning in common: few, however long it is. Any other
        lasts until the next: who goes on with an answer has all of it.
        """
        held = self._held[sequence]
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        if held.newest is not None:
            self.forget((held.newest,))
        slot = held.slots[held.tokens.index(sequence.computed)]
        self._users[slot] += 1
        self._kept[key] = slot
        size = sequence.computed // blocks
        ends = {(sequence.prompt_len - 1) // size}
        ends.update(phase.start // size for phase in sequence.request.phases[1:])
        lasts = blocks in ends or not blocks & (blocks - 1)
        held.newest = None if lasts else key

    def forget(self, keys: Iterable[bytes]) -> None:
        """None of these can be found any more."""
        for key in keys:
            if key in self._kept:
                self._leave(self._kept.pop(key))

    def _own(self, held: _Held, at: int) -> int:
        """A slot of the sequence's that nobody else goes on from, to write to."""
        slot = held.slots[at]
        if slot == NOBODY or self._users[slot] > 1:
            if slot != NOBODY:
                self._leave(slot)
            slot = held.slots[at] = self._take()
        return slot

    def _take(self) -> int:
        if not self._free and self.count >= self.most:
            idle = next((key for key, slot in self._kept.items() if self._users[slot] == 1), None)
            if idle is not None:
                self.forget((idle,))
        if not self._free:
            self._free.append(self.count)
            self.count += 1
        slot = self._free.pop()
        self._users[slot] = 1
        return slot

    def _leave(self, slot: int) -> None:
        self._users[slot] -= 1
        if not self._users[slot]:
            del self._users[slot]
            self._free.append(slot)

    def _let_go(self, sequence: Sequence) -> None:
        held = self._held.pop(sequence, None)
        for slot in held.slots if held is not None else ():
            if slot != NOBODY:
                self._leave(slot)

    def _drop_ended(self) -> None:
        """Who has no blocks ended or was sent back, and begins anew."""
        for sequence in [s for s in self._held if not s.blocks]:
            self._let_go(sequence)
