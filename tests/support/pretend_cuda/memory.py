"""The device's memory: who wrote and who read which bytes, and whether that was in some order.

An access that no event orders behind a conflicting one of another stream is a race, also where
it happened to go well. So is giving memory back while another stream still works on it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch

from tests.support.pretend_cuda.clocks import Clocks
from tests.support.pretend_cuda.faults import Notices

Range = tuple[int, int]
"""Bytes [start, stop) by address."""


@dataclass(eq=False)
class Allocation:
    """One storage, alive as long as a tensor of the device stands on it.

    Its owner is the stream it was allocated on: whatever comes next there may get its bytes.
    """

    memory: "Memory"
    whole: Range
    owner: int
    capture: object = None
    """What was being captured when it was made: it lies in a graph's own memory."""
    accesses: dict[tuple[Range, int, bool], tuple[int, str]] = field(default_factory=dict)
    """(bytes, stream, whether written) → the last work that did, and its name."""

    def __del__(self) -> None:
        self.memory.freed(self)


class Memory:
    """Every allocation of a device."""

    def __init__(self, clocks: Clocks, notices: Notices) -> None:
        self._clocks, self._notices = clocks, notices
        self._found: WeakValueDictionary[int, Allocation] = WeakValueDictionary()
        self.faults: list[str] = []
        """Of memory that was given back; there is nobody to raise them to at once."""
        self.nbytes = 0

    def of(self, elem: torch.Tensor, *, owner: int, capture: object = None) -> Allocation:
        """The allocation that a tensor stands on, made where there is none yet."""
        storage = elem.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        found = self._found.get(start) if size else None
        if found is None:
            found = Allocation(self, (start, start + size), owner, capture)
            self.nbytes += size
            if size:
                self._found[start] = found
        return found

    def at(self, start: int) -> Allocation | None:
        """The allocation whose storage begins there, if it is alive."""
        return self._found.get(start)

    def touch(
        self, allocation: Allocation, what: Range, *, work: tuple[int, int], write: bool, name: str
    ) -> None:
        """`work`, a stream and its number there, reads or writes bytes. Raises PretendFault."""
        stream, number = work
        for (other, their, wrote), (at, before) in allocation.accesses.items():
            if (
                their != stream
                and (write or wrote)
                and other[0] < what[1]
                and what[0] < other[1]
                and not self._clocks.ordered(their, at, stream)
            ):
                verbs = ("writes" if write else "reads", "wrote" if wrote else "read")
                raise self._notices.fault(
                    f"{name} on stream {stream} {verbs[0]} {what[1] - what[0]} bytes that {before} "
                    f"on stream {their} {verbs[1]}, with no event between them"
                )
        if write:  # whoever comes behind this write comes behind what it hid
            hidden = [k for k in allocation.accesses if what[0] <= k[0][0] and k[0][1] <= what[1]]
            for key in hidden:
                del allocation.accesses[key]
        allocation.accesses[what, stream, write] = (number, name)

    def freed(self, allocation: Allocation) -> None:
        """The last tensor is gone: may the owner's next work have the bytes?"""
        self.nbytes -= allocation.whole[1] - allocation.whole[0]
        if allocation.capture is not None:
            return
        for (_, stream, _), (number, name) in allocation.accesses.items():
            if not self._clocks.ordered(stream, number, allocation.owner):
                self.faults.append(
                    f"{allocation.whole[1] - allocation.whole[0]} bytes of stream "
                    f"{allocation.owner} were given back while {name} on stream {stream} may still "
                    "use them; record_stream or an event is missing"
                )
                return

    def check(self) -> None:
        """Raise what nobody could be told yet. PretendFault."""
        if self.faults:
            raise self._notices.fault(self.faults.pop(0))


def span(elem: torch.Tensor) -> Range:
    """The bytes of a tensor, and those between them."""
    if not elem.numel():
        return (0, 0)
    last = sum((n - 1) * s for n, s in zip(elem.shape, elem.stride(), strict=True))
    start = elem.data_ptr()
    return start, start + (last + 1) * elem.element_size()


def merged(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes in as few ranges as there can be."""
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found
