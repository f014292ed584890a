"""Which tokens of which sequences the next step computes. A pure function of its own state.

Knows blocks, slots and token ids as integers; no clock, no randomness, no text, no tensors.
"""

from collections import Counter
from collections.abc import Mapping
from itertools import islice

from fader_adapters.errors import AdapterError
from fader_adapters.spec import Digest, RowTerms, StepTerms, Upload
from fader_server.core import (
    AdapterPool,
    Plan,
    PlanRow,
    Request,
    RowResult,
    Sequence,
    TokenEvent,
)
from fader_server.engine.blocks import BlockManager
from fader_server.engine.following import following
from fader_server.engine.lanes import Lanes
from fader_server.engine.limits import Limits, check_request
from fader_server.engine.outcome import outcome
from fader_server.engine.roster import Roster
from fader_server.engine.shares import Share, Shares
from fader_server.engine.stats import TenantStats
from fader_server.errors import EngineFault, NumericFault

_LOOKAHEAD = 64
"""Waiting requests that one step looks at for whose adapters are or could be on the device."""


class Scheduler:
    """Fair between tenants, first come, first served within one; decode before prefill; recompute
    when blocks run out.

    Every accepted request ends in exactly one event with `finish` or `error`, unless it is
    aborted: then the caller, who asked, gets no event. Not thread-safe, but for `check`.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        blocks: BlockManager,
        pool: AdapterPool,
        shares: Mapping[str, Share] | None = None,
    ) -> None:
        """shares: of the tenants that have no equal or not the whole part."""
        self.limits = limits
        self.blocks = blocks
        self.pool = pool
        self.context = min(limits.max_model_len, blocks.total * blocks.block_size)
        """Tokens the longest sequence may have."""
        self.preemptions = 0
        self._shares = Shares(shares or {}, limits=limits, blocks=blocks, pool=pool)
        self._roster = Roster(blocks, pool, self._shares.weights)
        self._refused: list[TokenEvent] = []

    @property
    def lanes(self) -> Lanes:
        """Merged lanes and who is in them."""
        return self._roster.lanes

    @property
    def running(self) -> int:
        return len(self._roster.running)

    @property
    def waiting(self) -> int:
        return len(self._roster.waiting)

    def waiting_of(self, tenant: str) -> int:
        """How many of one tenant's requests were never admitted. Any thread."""
        return self._roster.waiting.waiting(tenant)

    def tenants(self) -> dict[str, TenantStats]:
        """What every tenant that ever asked has and had. Any thread."""
        line = self._roster.waiting
        rows = Counter(sequence.request.tenant for sequence in list(self._roster.running))
        return {
            tenant: TenantStats(running=rows[tenant], waiting=line.waiting(tenant), tokens=tokens)
            for tenant, tokens in list(line.tokens.items())
        }

    def check(self, request: Request) -> None:
        """Raise for what can never be served. Any thread.

        RequestInvalid, ContextTooLong, or AdapterTooLarge: no arena of this size holds the blend.
        """
        check_request(request, self.context)
        self.pool.check(request.adapters)

    def add(self, request: Request) -> Sequence:
        """Queue a request. Raises what `check` raises, and RequestInvalid on an id in use."""
        self.check(request)
        return self._roster.enter(request)

    def abort(self, request_id: str) -> bool:
        """End a request without an event, at any time, also between plan and commit.

        False when no such request is open.
        """
        sequence = self._roster.open.get(request_id)
        if sequence is None:
            return False
        self._roster.leave(sequence)
        return True

    def fail(self, request_id: str, error: Exception) -> list[TokenEvent]:
        """End a request with this error; no event when no such request is open."""
        return [TokenEvent(request_id, error=error)] if self.abort(request_id) else []

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks and pins; it goes to the front of the line."""
        self._roster.send_back(sequence)
        self.preemptions += 1

    def take_refused(self) -> list[TokenEvent]:
        """Events of requests that the last `plan` found impossible to go on with."""
        refused, self._refused = self._refused, []
        return refused

    def plan(self) -> Plan | None:
        """The next step, or None when nothing can run now. Commit it, and what `ahead` gave after
        it, before the next plan."""
        rows: list[PlanRow] = []
        terms: list[RowTerms] = []
        self._refuse_misplaced()
        prefills = self._plan_decodes(rows, terms)
        budget = self.limits.max_step_tokens - len(rows)
        for sequence in prefills:
            budget -= self._plan_chunk(sequence, budget, rows, terms)
        uploads: list[Upload] = []
        if self._roster.waiting:
            # Who finds its adapters on the device goes first: what is there is used while it is.
            left = self._admit(budget, rows, terms, uploads, evict=False)
            if left is not None:
                self._admit(left, rows, terms, uploads, evict=True)
        if not rows:
            return None
        if self._roster.waiting:
            uploads.extend(self._prefetch())
        return Plan(tuple(rows), StepTerms(tuple(terms)), tuple(uploads))

    def ahead(self, plan: Plan) -> Plan | None:
        """The step after `plan`, before that is committed; None where it cannot be told yet."""
        roster = self._roster
        if len(plan.rows) < self.limits.max_rows and not all(
            self._shares.full(tenant, roster.running) for tenant in roster.waiting.tenants
        ):
            return None  # somebody might be admitted
        return following(plan, roster=roster, blocks=self.blocks, limits=self.limits)

    def commit(self, plan: Plan, results: list[RowResult]) -> list[TokenEvent]:
        """Take the results of a plan, or of some of its rows, in; one result per row.

        Rows whose sequence ended, was aborted or preempted since the plan are skipped.
        """
        assert len(plan.rows) == len(results), "one result per row"
        events: list[TokenEvent] = []
        blocks, size = self.blocks, self.blocks.block_size
        for row, result in zip(plan.rows, results, strict=True):
            sequence = row.sequence
            if not sequence.blocks:
                continue
            if not result.finite:
                events.append(self._numeric_fault(sequence))
                continue
            if row.samples:
                self._roster.waiting.charge(sequence, 1)
            event = outcome(row, result, self.limits.max_model_len)
            if sequence.computed // size > sequence.published:
                blocks.publish(sequence)
            if event is not None:
                events.append(event)
                if event.finish is not None:
                    self._roster.leave(sequence)
        return events

    def _refuse_misplaced(self) -> None:
        """A pinned version that moved must never answer for another: fail its requests."""
        in_place = self._roster.in_place
        for sequence in [s for s in self._roster.running if not in_place(s)]:
            fault = EngineFault("an adapter of this request left the device while it ran")
            self._refused += self.fail(sequence.request.id, fault)

    def _plan_decodes(self, rows: list[PlanRow], terms: list[RowTerms]) -> list[Sequence]:
        """One row for every decoding sequence, oldest first; returns those in prefill, in turn."""
        prefills: list[Sequence] = []
        size = self.blocks.block_size
        for sequence in self._roster.running:  # preemption removes from the tail only
            if not sequence.decoding:
                prefills.append(sequence)
                continue
            start = sequence.computed
            if start == len(sequence.blocks) * size and not self._grow(sequence):
                continue
            rows.append(PlanRow(sequence, start, 1, True))
            terms.append(sequence.terms)
        clock = self._roster.waiting.clock
        return sorted(prefills, key=lambda sequence: clock(sequence.request.tenant))

    def _grow(self, sequence: Sequence) -> bool:
        """One more block, taken from the newest running sequences; False when that is itself."""
        while not self.blocks.grow(sequence):
            newest = self._roster.running[-1]
            self.preempt(newest)
            if newest is sequence:
                return False
        return True

    def _plan_chunk(
        self, sequence: Sequence, budget: int, rows: list[PlanRow], terms: list[RowTerms]
    ) -> int:
        """Add the sequence's next chunk if the budget holds all of it; returns its tokens."""
        start = sequence.computed
        count = self._chunk(sequence, start)
        if count > budget:
            return 0
        last = start + count == len(sequence.tokens)
        samples = last and sequence.request.params.max_tokens > 0
        rows.append(PlanRow(sequence, start, count, samples))
        terms.append(RowTerms(count, sequence.terms.terms))
        return count

    def _chunk(self, sequence: Sequence, start: int) -> int:
        """Tokens of the chunk from `start`: to a multiple of chunk_size, or the prompt's end."""
        size = self.limits.chunk_size
        end = min((start // size + 1) * size, len(sequence.tokens))
        prompt_len = sequence.prompt_len
        return (min(end, prompt_len) if start < prompt_len else end) - start

    def _admit(
        self,
        budget: int,
        rows: list[PlanRow],
        terms: list[RowTerms],
        uploads: list[Upload],
        *,
        evict: bool,
    ) -> int | None:
        """Let requests in, in turn; returns the tokens left, None when the line has to wait.

        Those of a tenant that has its share already wait for its own. Of others only those whose
        adapters have no room, or none without an eviction, are passed by, and each of them only so
        often: then nobody goes before it.
        """
        line, running, blocks = self._roster.waiting, self._roster.running, self.blocks
        passed: list[Sequence] = []
        no_room: set[Digest] = set()
        full: set[str] = set()
        for sequence in line.in_turn(full):
            if len(running) >= self.limits.max_rows:
                return None
            if len(passed) == _LOOKAHEAD:
                return budget
            self._roster.settle(sequence)
            if not self._shares.admit(sequence, running):
                full.add(sequence.request.tenant)
                continue
            aged = sequence.overtaken >= self.limits.max_overtakes
            if not (evict or aged) and self.pool.displaces(sequence.adapters):
                passed.append(sequence)
                continue
            hits, sought = self._find(sequence)
            total = blocks.blocks_for(len(sequence.tokens))
            # One block for every running row too, or the newcomer would soon be sent back.
            if blocks.room(hits) < total - len(hits) + len(running):
                return None
            if self._chunk(sequence, len(hits) * blocks.block_size) > budget:
                return None
            blend = sequence.request.blend.digest
            crowded = blend in no_room and sequence.lane is None
            acquired = None if crowded else self._acquire(sequence)
            if acquired is None:
                if sequence.request.id not in self._roster.open:
                    continue
                if aged:
                    return None
                no_room.add(blend)
                passed.append(sequence)
                continue
            uploads.extend(acquired)
            self._roster.start(sequence, hits, total=total, sought=sought)
            budget -= self._plan_chunk(sequence, budget, rows, terms)
            for other in passed:
                other.overtaken += 1
            if any(other.overtaken >= self.limits.max_overtakes for other in passed):
                return None
        return budget

    def _prefetch(self) -> tuple[Upload, ...]:
        """Copies for who waits, so that they need not wait for them as well."""
        line = (sequence.request.adapters for sequence in self._roster.waiting)
        return self.pool.prefetch(islice(line, _LOOKAHEAD))

    def _find(self, sequence: Sequence) -> tuple[list[int], int]:
        """Findable blocks and how many were sought: the last token is always computed."""
        if sequence.request.params.prompt_logprobs is not None:
            return [], 0
        sought = (len(sequence.tokens) - 1) // self.blocks.block_size
        return self.blocks.find(sequence, sought), sought

    def _acquire(self, sequence: Sequence) -> tuple[Upload, ...] | None:
        """Pin the adapters; None: not now, or never, and then the request has failed."""
        try:
            return self._roster.acquire(sequence)
        except Exception as error:  # noqa: BLE001 - the pool's fault must end this request only
            if not isinstance(error, AdapterError):
                fault = EngineFault("the adapters of this request could not be brought in")
                fault.__cause__ = error
                error = fault
            self._refused += self.fail(sequence.request.id, error)
            return None

    def _numeric_fault(self, sequence: Sequence) -> TokenEvent:
        """End a request whose logits are not finite; nothing it computed can be found again."""
        self.blocks.withdraw(sequence)
        self._roster.leave(sequence)
        error = NumericFault("the adapters of this request gave numbers that are not finite")
        return TokenEvent(sequence.request.id, error=error)
