"""Which tokens of which sequences the next step computes. A pure function of its own state.

Knows blocks, slots and token ids as integers; no clock, no randomness, no text, no tensors.
"""

from collections import Counter
from collections.abc import Mapping

from fader_server.core import (
    AdapterPool,
    Plan,
    Request,
    RowResult,
    Sequence,
    TokenEvent,
)
from fader_server.engine.admission import AdmissionControl
from fader_server.engine.blocks import BlockManager
from fader_server.engine.draft import Draft
from fader_server.engine.following import following
from fader_server.engine.lanes import Lanes
from fader_server.engine.limits import Limits, check_ids, check_request
from fader_server.engine.lookup import Lookup
from fader_server.engine.outcome import outcome
from fader_server.engine.roster import Roster
from fader_server.engine.shares import Share, Shares
from fader_server.engine.stats import TenantStats
from fader_server.errors import EngineFault, NumericFault


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
        self.merged = 0
        """Tokens drawn in a merged lane."""
        self.lookup = Lookup(
            rows=min(limits.lookup, limits.max_rows),
            blocks=blocks,
            max_model_len=limits.max_model_len,
        )
        self._checked: tuple[int, ...] = ()
        """The last prompt whose ids were looked at: choices of a call share one."""
        self._shares = Shares(shares or {}, limits=limits, blocks=blocks, pool=pool)
        self._roster = Roster(blocks, pool, self._shares.weights)
        self._admission = AdmissionControl(
            self._roster,
            limits=limits,
            blocks=blocks,
            pool=pool,
            shares=self._shares,
            refuse=self._refuse,
        )
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

    def share(self, shares: Mapping[str, Share]) -> None:
        """Other parts for the tenants, see the constructor."""
        self._shares.replace(shares)

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
        if request.prompt is not self._checked:
            check_ids(request.prompt)
            self._checked = request.prompt
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
        self._refuse_misplaced()
        draft = Draft(self.limits)
        for sequence in self._plan_decodes(draft):
            draft.add_chunk(sequence)
        self._admission.admit(draft)
        self.lookup.fill(draft)
        return draft.plan()

    def ahead(self, plan: Plan) -> Plan | None:
        """The step after `plan`, before that is committed; None where it cannot be told yet."""
        if len(plan.rows) < self.limits.max_rows and self._admission.expected:
            return None
        if self.lookup.may_fill(len(plan.rows)):
            return None  # which guesses that step has, the tokens of this one say
        return following(plan, roster=self._roster, blocks=self.blocks, limits=self.limits)

    def commit(self, plan: Plan, results: list[RowResult]) -> list[TokenEvent]:
        """Take the results of a plan, or of some of its rows, in; one result per row.

        Rows whose sequence ended, was aborted or preempted since the plan are skipped, and those
        for guesses that did not come.
        """
        assert len(plan.rows) == len(results), "one result per row"
        events: list[TokenEvent] = []
        blocks, size = self.blocks, self.blocks.block_size
        for row, result in zip(plan.rows, results, strict=True):
            sequence = row.sequence
            if not sequence.blocks:
                continue
            if row.guesses and not self.lookup.came(row):
                continue
            if not result.finite:
                events.append(self._numeric_fault(sequence))
                continue
            if result.fault is not None:
                events += self.fail(sequence.request.id, result.fault)
                continue
            if row.samples:
                self._roster.waiting.charge(sequence, 1)
                self.merged += row.lane is not None
            try:
                event = outcome(row, result, self.limits.max_model_len)
            except EngineFault as fault:
                events += self.fail(sequence.request.id, fault)
                continue
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
            self._refuse(sequence, fault)

    def _refuse(self, sequence: Sequence, error: Exception) -> None:
        self._refused += self.fail(sequence.request.id, error)

    def _plan_decodes(self, draft: Draft) -> list[Sequence]:
        """One row for every decoding sequence, oldest first; returns those in prefill, in turn."""
        prefills: list[Sequence] = []
        size = self.blocks.block_size
        for sequence in self._roster.running:  # preemption removes from the tail only
            if not sequence.decoding:
                prefills.append(sequence)
                continue
            full = sequence.computed == len(sequence.blocks) * size
            if not full or self._grow(sequence):
                draft.add_token(sequence)
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

    def _numeric_fault(self, sequence: Sequence) -> TokenEvent:
        """End a request whose logits are not finite; nothing it computed can be found again."""
        self.blocks.withdraw(sequence)
        self._roster.leave(sequence)
        error = NumericFault("the adapters of this request gave numbers that are not finite")
        return TokenEvent(sequence.request.id, error=error)
