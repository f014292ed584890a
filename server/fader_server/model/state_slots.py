"""Where the states of running sequences lie: two slots each, used in turn. Integers only.

A step reads a sequence's state from one slot and leaves the next in the other, so that the same
step may be run again, or a smaller one that begins at the same token.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass

from fader_server.core import PlanRow, Sequence
from fader_server.errors import EngineFault

NOBODY = -1
"""The slot that a sequence's first tokens go on from."""
SPARE = 2
"""Slots that are nobody's, the first ones: for rows that are made up."""


@dataclass(slots=True)
class _Held:
    """A sequence's slots and how many of its tokens each stands for; None: of no use."""

    slots: tuple[int, int]
    tokens: list[int | None]


class StateSlots:
    """Of the sequences that run, by identity."""

    def __init__(self) -> None:
        self.count = SPARE
        """Slots there are."""
        self._free: list[int] = []
        self._held: dict[Sequence, _Held] = {}

    @property
    def held(self) -> int:
        """Slots that sequences have."""
        return 2 * len(self._held)

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
                held = held or self._new(row.sequence)
                held.tokens = [None, None]
                came_from.append(NOBODY)
                to.append(held.slots[0])
            elif held is not None and row.start in held.tokens:
                at = held.tokens.index(row.start)
                held.tokens[1 - at] = None
                came_from.append(held.slots[at])
                to.append(held.slots[1 - at])
            else:
                raise EngineFault("the state of this sequence is not where its step begins")
        return came_from, to

    def computed(self, rows: Many[PlanRow]) -> None:
        """The states of these rows are there now."""
        for row in rows:
            held = self._held[row.sequence]
            at = 0 if row.start == 0 else 1 - held.tokens.index(row.start)
            held.tokens[at] = row.start + row.count

    def _new(self, sequence: Sequence) -> _Held:
        if not self._free:
            self._free = [self.count + 1, self.count]
            self.count += 2
        held = self._held[sequence] = _Held((self._free.pop(), self._free.pop()), [None, None])
        return held

    def _drop_ended(self) -> None:
        """Who has no blocks ended or was sent back, and begins anew."""
        for sequence in [s for s in self._held if not s.blocks]:
            self._free += reversed(self._held.pop(sequence).slots)
