"""The waiting line: tenants take turns by what was computed for them; within one, first come first.

Start-time fair queueing over tokens: every tenant has a clock that its tokens move on, slower the
more weight it has, and the one that is behind is next. Where nobody waits nobody is behind, and a
tenant of which nobody waited starts with the slowest of those that do, not before whom was last
admitted: neither idle time nor a little work is saved up. Numbers and ids only.
"""

from collections import Counter, deque
from collections.abc import Container, Iterator, Mapping
from heapq import heapify, heappop, heapreplace

from fader_server.core import Sequence


class Line:
    """Who waits, and what every tenant was given. Owned by the engine thread, but for counts."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """weights: of the tenants that have another than 1."""
        self._weights = weights
        self._returned: deque[Sequence] = deque()
        self._queues: dict[str, deque[Sequence]] = {}
        """Of the tenants that have somebody there."""
        self._clocks: dict[str, float] = {}
        self._admitted = 0.0
        """The furthest clock of a tenant when one of its requests was admitted."""
        self.tokens: Counter[str] = Counter()
        """Computed for every tenant so far, none of them twice."""

    def __len__(self) -> int:
        return len(self._returned) + sum(len(queue) for queue in list(self._queues.values()))

    def __iter__(self) -> Iterator[Sequence]:
        """Everybody, in turn."""
        return self.in_turn(())

    @property
    def tenants(self) -> set[str]:
        """Of those who wait."""
        return {s.request.tenant for s in self._returned} | self._queues.keys()

    def waiting(self, tenant: str) -> int:
        """How many of one tenant were never admitted. Any thread."""
        return len(self._queues.get(tenant, ()))

    def clock(self, tenant: str) -> float:
        """Tokens computed for it over its weight, from where it started."""
        return self._clocks.get(tenant, 0.0)

    def join(self, sequence: Sequence) -> None:
        """A new request, at the end of its tenant's queue."""
        tenant = sequence.request.tenant
        if not len(self):
            self._clocks.clear()
            self._admitted = 0.0
        if tenant not in self._queues:
            slowest = min((self.clock(other) for other in self._queues), default=0.0)
            self._clocks[tenant] = max(self.clock(tenant), slowest, self._admitted)
        self._queues.setdefault(tenant, deque()).append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """One that ran goes before everybody: its tenant has paid for it."""
        self._returned.appendleft(sequence)

    def admit(self, sequence: Sequence, tokens: int) -> None:
        """One that waits begins to run; the first time `tokens` of its prompt are to compute."""
        self._remove(sequence)
        if not sequence.settled:
            self._admitted = max(self._admitted, self.clock(sequence.request.tenant))
            self.charge(sequence, tokens)

    def charge(self, sequence: Sequence, tokens: int) -> None:
        """So much was computed for its tenant."""
        tenant = sequence.request.tenant
        self.tokens[tenant] += tokens
        self._clocks[tenant] = self.clock(tenant) + tokens / self._weights.get(tenant, 1.0)

    def end(self, sequence: Sequence) -> None:
        """A request ends, whether it waits or runs."""
        if not sequence.blocks:
            self._remove(sequence)

    def in_turn(self, closed: Container[str]) -> Iterator[Sequence]:
        """Everybody, in the order in which they would be admitted; nobody of the tenants that are
        in `closed` by then. Who was given last may leave the line before the next is asked for."""
        returned, at = self._returned, 0
        while at < len(returned):
            sequence = returned[at]
            if sequence.request.tenant not in closed:
                yield sequence
            at += at < len(returned) and returned[at] is sequence
        heap = [
            (self._clocks[tenant], queue[0].arrival, tenant, 0)
            for tenant, queue in self._queues.items()
        ]
        heapify(heap)
        queues = dict(self._queues)
        while heap:
            clock, _, tenant, at = heap[0]
            queue = queues[tenant]
            if tenant in closed or at == len(queue):
                heappop(heap)
                continue
            sequence = queue[at]
            yield sequence
            at += at < len(queue) and queue[at] is sequence
            if at < len(queue):
                clock += len(sequence.tokens) / self._weights.get(tenant, 1.0)
                heapreplace(heap, (clock, queue[at].arrival, tenant, at))
            else:
                heappop(heap)

    def _remove(self, sequence: Sequence) -> None:
        if sequence.settled:
            self._returned.remove(sequence)
            return
        tenant = sequence.request.tenant
        queue = self._queues[tenant]
        queue.remove(sequence)
        if not queue:
            del self._queues[tenant]
