"""The extent allocator: nothing overlaps, nothing is lost, everything comes back as one."""

from itertools import pairwise

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fader_adapters.extents import ExtentAllocator
from fader_adapters.spec import EXTENT_ALIGN

CAPACITY = 40 * EXTENT_ALIGN


class Extents(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.extents = ExtentAllocator(CAPACITY + EXTENT_ALIGN - 1)
        self.live: dict[int, int] = {}

    @rule(size=st.integers(1, CAPACITY + 1))
    def allocate(self, size):
        largest = max((size for _, size in self.extents.holes), default=0)
        offset = self.extents.allocate(size)
        rounded = -(-size // EXTENT_ALIGN) * EXTENT_ALIGN
        assert (offset is None) == (rounded > largest)
        if offset is not None:
            self.live[offset] = rounded

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data):
        offset = data.draw(st.sampled_from(sorted(self.live)))
        self.extents.release(offset)
        del self.live[offset]

    @rule()
    def a_copy_is_independent(self):
        twin = self.extents.copy()
        before = self.extents.holes
        assert twin.holes == before
        while twin.allocate(1) is not None:
            pass
        assert self.extents.holes == before

    @invariant()
    def nothing_overlaps_and_nothing_is_lost(self):
        ranges = sorted([*self.live.items(), *self.extents.holes])
        cursor = 0
        for offset, size in ranges:
            assert offset == cursor
            assert offset % EXTENT_ALIGN == 0
            cursor += size
        assert cursor == CAPACITY == self.extents.capacity
        assert self.extents.used == sum(self.live.values()) == CAPACITY - self.extents.free

    @invariant()
    def holes_never_touch(self):
        for (offset, size), (after, _) in pairwise(self.extents.holes):
            assert offset + size < after

    def teardown(self):
        for offset in self.live:
            self.extents.release(offset)
        assert self.extents.holes == ((0, CAPACITY),)


TestExtents = Extents.TestCase


def test_releasing_twice_is_a_fault():
    extents = ExtentAllocator(CAPACITY)
    offset = extents.allocate(1)
    assert offset is not None
    extents.release(offset)
    with pytest.raises(KeyError):
        extents.release(offset)


def test_fits_empty_says_what_could_ever_fit():
    extents = ExtentAllocator(CAPACITY)
    extents.allocate(CAPACITY)
    assert extents.fits_empty(CAPACITY)
    assert extents.fits_empty(1, CAPACITY - EXTENT_ALIGN)
    assert not extents.fits_empty(1, CAPACITY)
    assert not extents.fits_empty(CAPACITY + 1)
    assert ExtentAllocator(EXTENT_ALIGN - 1).allocate(1) is None
