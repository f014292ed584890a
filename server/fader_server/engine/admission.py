"""Who of those that wait begins to run: rows, blocks, room for adapters and tenants' shares."""

from collections.abc import Callable
from itertools import islice

from fader_adapters.errors import AdapterError
from fader_adapters.spec import Digest, Upload
from fader_server.core import AdapterPool, Sequence
from fader_server.engine.blocks import BlockManager
from fader_server.engine.draft import Draft
from fader_server.engine.limits import Limits
from fader_server.engine.roster import Roster
from fader_server.engine.shares import Shares
from fader_server.errors import EngineFault

_LOOKAHEAD = 64
"""Waiting requests that one step looks at for whose adapters are or could be on the device."""

Refuse = Callable[[Sequence, Exception], None]
"""Ends a request that can never run."""


class AdmissionControl:
    """Lets requests into a draft, in the line's turn. Owned by the scheduler."""

    def __init__(
        self,
        roster: Roster,
        *,
        limits: Limits,
        blocks: BlockManager,
        pool: AdapterPool,
        shares: Shares,
        refuse: Refuse,
    ) -> None:
        self._roster = roster
        self._limits = limits
        self._blocks = blocks
        self._pool = pool
        self._shares = shares
        self._refuse = refuse

    @property
    def expected(self) -> bool:
        """Whether a step with a free row might let somebody in."""
        full, running = self._shares.full, self._roster.running
        return not all(full(tenant, running) for tenant in self._roster.waiting.tenants)

    def admit(self, draft: Draft) -> None:
        """Let in whom there is room for, with copies of adapters for them; beside rows of a step
        also for who waits on."""
        if not self._roster.waiting:
            return
        # Who finds its adapters on the device goes first: what is there is used while it is.
        if self._pass(draft, evict=False):
            self._pass(draft, evict=True)
        if self._roster.waiting and not draft.empty:
            draft.uploads.extend(self._prefetch())

    def _prefetch(self) -> tuple[Upload, ...]:
        """Copies for who waits, so that they need not wait for them as well."""
        line = (sequence.request.adapters for sequence in self._roster.waiting)
        return self._pool.prefetch(islice(line, _LOOKAHEAD))

    def _pass(self, draft: Draft, *, evict: bool) -> bool:
        """Let requests in, in turn; False when the line has to wait.

        Those of a tenant that has its share already wait for its own. Of others only those whose
        adapters have no room, or none without an eviction, are passed by, and each of them only so
        often: then nobody goes before it.
        """
        running, blocks, most = self._roster.running, self._blocks, self._limits.max_overtakes
        passed: list[Sequence] = []
        no_room: set[Digest] = set()
        full: set[str] = set()
        for sequence in self._roster.waiting.in_turn(full):
            if len(running) >= self._limits.max_rows:
                return False
            if len(passed) == _LOOKAHEAD:
                return True
            self._roster.settle(sequence)
            if not self._shares.admit(sequence, running):
                full.add(sequence.request.tenant)
                continue
            aged = sequence.overtaken >= most
            if not (evict or aged) and self._pool.displaces(sequence.adapters):
                passed.append(sequence)
                continue
            hits, sought = self._find(sequence)
            total = blocks.blocks_for(len(sequence.tokens))
            # One block for every running row too, or the newcomer would soon be sent back.
            if blocks.room(hits) < total - len(hits) + len(running):
                return False
            if draft.chunk(sequence, len(hits) * blocks.block_size) > draft.room:
                return False
            blend = sequence.request.blend.digest
            crowded = blend in no_room and sequence.lane is None
            acquired = None if crowded else self._acquire(sequence)
            if acquired is None:
                if sequence.request.id not in self._roster.open:
                    continue
                if aged:
                    return False
                no_room.add(blend)
                passed.append(sequence)
                continue
            draft.uploads.extend(acquired)
            self._roster.start(sequence, hits, total=total, sought=sought)
            draft.add_chunk(sequence)
            for other in passed:
                other.overtaken += 1
            if any(other.overtaken >= most for other in passed):
                return False
        return True

    def _find(self, sequence: Sequence) -> tuple[list[int], int]:
        """Findable blocks and how many were sought: the last token is always computed."""
        if sequence.request.params.prompt_logprobs is not None or not self._blocks.findable:
            return [], 0
        sought = (len(sequence.tokens) - 1) // self._blocks.block_size
        return self._blocks.find(sequence, sought), sought

    def _acquire(self, sequence: Sequence) -> tuple[Upload, ...] | None:
        """Pin the adapters; None: not now, or never, and then the request was refused."""
        try:
            return self._roster.acquire(sequence)
        except Exception as error:  # noqa: BLE001 - the pool's fault must end this request only
            if not isinstance(error, AdapterError):
                fault = EngineFault("the adapters of this request could not be brought in")
                fault.__cause__ = error
                error = fault
            self._refuse(sequence, error)
            return None
