"""Where every open sequence is: waiting or running. Each move takes its blocks and pins along.

Decides nothing: the scheduler says who moves.
"""

from collections.abc import Mapping

from fader_adapters.spec import RowTerms, Upload
from fader_server.core import AdapterPool, Request, Sequence
from fader_server.engine.blocks import BlockManager
from fader_server.engine.lanes import Lanes
from fader_server.engine.line import Line
from fader_server.errors import RequestInvalid


class Roster:
    """Open sequences by id, in the waiting line or among the running; never in both."""

    def __init__(
        self, blocks: BlockManager, pool: AdapterPool, weights: Mapping[str, float]
    ) -> None:
        """weights: of tenants, see Line."""
        self.open: dict[str, Sequence] = {}
        self.waiting = Line(weights)
        self.lanes = Lanes()
        self.running: list[Sequence] = []
        """By arrival, oldest first."""
        self._blocks = blocks
        self._pool = pool
        self._arrivals = 0

    def enter(self, request: Request) -> Sequence:
        """A new sequence at the end of its tenant's line. Raises RequestInvalid on an id in use."""
        if request.id in self.open:
            raise RequestInvalid(f"request id {request.id!r} is in use")
        self._arrivals += 1
        sequence = Sequence(request, list(request.prompt), arrival=self._arrivals)
        self.open[request.id] = sequence
        self.waiting.join(sequence)
        return sequence

    def acquire(self, sequence: Sequence) -> tuple[Upload, ...] | None:
        """Pin its adapters; None: not now. Raises what the pool raises; nothing is pinned then."""
        adapters = sequence.adapters
        return self._pool.acquire(adapters) if adapters else ()

    def settle(self, sequence: Sequence) -> None:
        """Look at its prefix in the lane that it would be admitted to now."""
        lane = self.lanes.of(sequence)
        if lane is not sequence.lane:
            sequence.lane = lane
            sequence.keys.clear()

    def start(self, sequence: Sequence, hits: list[int], *, total: int, sought: int) -> None:
        """Waiting → running, with its adapters pinned: blocks, slots, place by arrival."""
        size = self._blocks.block_size
        self.waiting.admit(sequence, len(sequence.tokens) - len(hits) * size)
        self.lanes.enter(sequence)
        self._blocks.admit(sequence, hits, total=total, sought=sought)
        sequence.computed = len(hits) * size
        if not sequence.output_len:
            sequence.cached_tokens = sequence.computed
        slot, merged = self._pool.slot, sequence.lane is not None
        sequence.terms = tuple(
            RowTerms(1, () if merged else tuple((slot(t.version), t.gamma) for t in blend.terms))
            for blend in (phase.blend for phase in sequence.request.phases)
        )
        at = len(self.running)
        while at and self.running[at - 1].arrival > sequence.arrival:
            at -= 1
        self.running.insert(at, sequence)

    def in_place(self, sequence: Sequence) -> bool:
        """True while every version it uses still is in the slot it was admitted with. One in a
        merged lane uses none."""
        terms = sequence.terms[-1].terms  # no phase has one that the last has not
        if not terms:
            return True
        blend = sequence.request.phases[-1].blend
        for term, (slot, _) in zip(blend.terms, terms, strict=True):
            try:
                if self._pool.slot(term.version) != slot:
                    return False
            except LookupError:
                return False
        return True

    def send_back(self, sequence: Sequence) -> None:
        """Running → front of the line. It keeps its tokens, to be computed again later."""
        self.running.remove(sequence)
        self._let_go(sequence)
        sequence.computed = 0
        sequence.decoding = False
        self.waiting.put_back(sequence)

    def leave(self, sequence: Sequence) -> None:
        """An open sequence ends, wherever it is."""
        del self.open[sequence.request.id]
        self.waiting.end(sequence)
        if sequence.blocks:
            self.running.remove(sequence)
            self._let_go(sequence)
        self.lanes.leave(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        self._blocks.release(sequence)
        if sequence.adapters:
            self._pool.release(tuple(sequence.adapters))
