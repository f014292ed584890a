"""Which merged lane new requests take, and which old ones still run somebody. No weights."""

from collections import Counter
from collections.abc import Callable

from fader_server.core import Lane, Sequence


class Lanes:
    """At most one lane is open to new requests; a closed one goes with its last request.

    Owned by the engine thread.
    """

    def __init__(self) -> None:
        self.open: Lane | None = None
        self.members = 0
        """Open requests in any lane. May be read from any thread."""
        self._members: Counter[Lane] = Counter()
        self._gone: dict[Lane, Callable[[], None]] = {}

    def replace(self, lane: Lane | None, gone: Callable[[], None] = lambda: None) -> None:
        """Admit matching requests to `lane` from now on, and to no other; None: to none.

        `gone` is called once, on this thread, when the lane is replaced and its last request ended.
        """
        before, self.open = self.open, lane
        if lane is not None:
            self._gone[lane] = gone
        if before is not None and not self._members[before]:
            self._end(before)

    def of(self, sequence: Sequence) -> Lane | None:
        """The lane a request belongs to if it is admitted now."""
        if sequence.settled:
            return sequence.lane
        lane = self.open
        return lane if lane is not None and lane.blend == sequence.request.blend.digest else None

    def enter(self, sequence: Sequence) -> None:
        """A request is admitted, for the first time or again."""
        if sequence.settled:
            return
        sequence.settled = True
        if sequence.lane is not None:
            self._members[sequence.lane] += 1
            self.members += 1

    def leave(self, sequence: Sequence) -> None:
        """A request ends, whether it was ever admitted or not."""
        lane = sequence.lane
        if lane is None or not sequence.settled:
            return
        self._members[lane] -= 1
        self.members -= 1
        if not self._members[lane] and lane is not self.open:
            self._end(lane)

    def _end(self, lane: Lane) -> None:
        del self._members[lane]
        self._gone.pop(lane)()
