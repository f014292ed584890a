"""Which work on a device is sure to be done before which: a vector clock a stream, and the host's.

Integers only; knows no tensors. Work is named by its stream and its number there.
"""

Mark = dict[int, int]
"""For each stream the number of the last work that is done before whatever holds this."""


class Clocks:
    """The order of work on every stream of a device."""

    def __init__(self) -> None:
        self._known: list[Mark] = []
        self._host: Mark = {}

    def new(self) -> int:
        """A stream on which nothing ran yet."""
        self._known.append({len(self._known): 0})
        return len(self._known) - 1

    def work(self, stream: int) -> int:
        """One more work on a stream: its number there. What the host saw done is done before it."""
        known = self._known[stream]
        _join(known, self._host)
        known[stream] += 1
        return known[stream]

    def last(self, stream: int) -> int:
        """The number of the last work on a stream."""
        return self._known[stream][stream]

    def mark(self, stream: int) -> Mark:
        """An event: all that is on the stream by now, and what comes before that."""
        return dict(self._known[stream])

    def wait(self, stream: int, mark: Mark) -> None:
        """What comes on a stream now comes after an event."""
        _join(self._known[stream], mark)

    def saw(self, mark: Mark) -> None:
        """The host waited for an event."""
        _join(self._host, mark)

    def done(self, stream: int, number: int) -> bool:
        """Whether the host knows of some work that it is done."""
        return self._host.get(stream, 0) >= number

    def ordered(self, stream: int, number: int, behind: int) -> bool:
        """Whether some work is done before whatever comes next on the stream `behind`."""
        return (
            stream == behind
            or max(self._known[behind].get(stream, 0), self._host.get(stream, 0)) >= number
        )

    def everything(self) -> Mark:
        """All work on every stream."""
        return {stream: known[stream] for stream, known in enumerate(self._known)}


def _join(into: Mark, other: Mark) -> None:
    for stream, number in other.items():
        if into.get(stream, 0) < number:
            into[stream] = number
