"""Extents of a linear space, handed out first-fit. Integers only, neither bytes nor tensors."""

from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate

from fader_adapters.spec import EXTENT_ALIGN


class ExtentAllocator:
    """Non-overlapping [offset, offset + size) ranges, sizes rounded up to EXTENT_ALIGN."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // EXTENT_ALIGN * EXTENT_ALIGN
        """Elements that can be handed out."""
        self._holes: list[tuple[int, int]] = [(0, self.capacity)] if self.capacity else []
        self._sizes: dict[int, int] = {}
        self._used = 0

    @property
    def used(self) -> int:
        return self._used

    @property
    def free(self) -> int:
        return self.capacity - self.used

    @property
    def holes(self) -> tuple[tuple[int, int], ...]:
        """(offset, size) of every free range, by offset; no two of them touch."""
        return tuple(self._holes)

    def fits_empty(self, *sizes: int) -> bool:
        """Whether extents of these sizes would fit together if nothing else were there."""
        return sum(map(_round, sizes)) <= self.capacity

    def allocate(self, size: int) -> int | None:
        """Offset of a new extent of `size` ≥ 1 elements; None when no hole is large enough now."""
        assert size >= 1
        size = _round(size)
        for at, (offset, room) in enumerate(self._holes):
            if room >= size:
                self._holes[at : at + 1] = [(offset + size, room - size)] if room > size else []
                self._sizes[offset] = size
                self._used += size
                return offset
        return None

    def clearing(self, size: int, costs: Mapping[int, int]) -> list[int] | None:
        """Offsets of the extents to release so that `size` elements fit, at the least cost.

        costs  of the extents that may go, by offset; all others stay
        None: there is no such piece even without all of them. Changes nothing.
        """
        size = _round(size)
        offsets = sorted(self._sizes)
        cost = [0, *accumulate(costs.get(offset, 0) for offset in offsets)]
        stay = [0, *accumulate(offset not in costs for offset in offsets)]
        best: tuple[int, int, int] | None = None
        for first, start in enumerate((0, *(at + self._sizes[at] for at in offsets))):
            last = bisect_left(offsets, start + size)
            if start + size > self.capacity or stay[last] > stay[first]:
                continue
            found = (cost[last] - cost[first], first, last)
            best = found if best is None else min(best, found)
        return None if best is None else offsets[best[1] : best[2]]

    def release(self, offset: int) -> None:
        """Take back the extent at `offset` and join it with the holes beside it."""
        size = self._sizes.pop(offset)
        self._used -= size
        at = bisect_left(self._holes, (offset, 0))
        start, end, low, high = offset, offset + size, at, at
        if at > 0 and sum(self._holes[at - 1]) == offset:
            low, start = at - 1, self._holes[at - 1][0]
        if at < len(self._holes) and self._holes[at][0] == end:
            high, end = at + 1, sum(self._holes[at])
        self._holes[low:high] = [(start, end - start)]

    def copy(self) -> "ExtentAllocator":
        """An independent allocator in the same state, to try a plan on."""
        twin = ExtentAllocator(self.capacity)
        twin._holes = list(self._holes)
        twin._sizes = dict(self._sizes)
        twin._used = self._used
        return twin


def _round(size: int) -> int:
    return -(-size // EXTENT_ALIGN) * EXTENT_ALIGN
