"""One turn of the engine: plan, upload, run, commit, and what to do when one of them fails.

Where the device computes by itself, a step's events are delivered while it computes the next one,
and that one may begin before the last one's tokens are known. Runs on whatever thread calls it;
knows no queue, no sink and no other thread.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from traceback import format_exc

from fader_adapters.spec import Upload
from fader_server.core import (
    Admission,
    Launched,
    LaunchRunner,
    Plan,
    Request,
    RowResult,
    Runner,
    Sequence,
    TokenEvent,
)
from fader_server.engine.arrivals import AtOnce, Copies, arrived
from fader_server.engine.isolation import Overlap, probe, run_isolated, upload_isolated, without
from fader_server.engine.scheduler import Scheduler
from fader_server.engine.stats import StepObserver
from fader_server.errors import EngineFault

_log = logging.getLogger(__name__)

_OOM_PREEMPTIONS = 2
"""So often may a request be the newest of a step that ran out of memory before it fails."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that began before the one in front of it was committed."""

    plan: Plan
    launched: Launched


def _always() -> bool:
    return True


class Stepper:
    """Drives a scheduler and a runner; hands every event to `deliver`, in order.

    A LaunchRunner's events wait for the next step to be under way, or for a turn without one.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        upload: Callable[[tuple[Upload, ...]], None],
        *,
        deliver: Callable[[TokenEvent], None],
        clock: Callable[[], float],
        observer: StepObserver,
        copies: Copies | None = None,
    ) -> None:
        self.scheduler = scheduler
        self._copies = copies or AtOnce()
        self.progress_at = clock()
        """When a step was last committed or nothing was there to do, in the clock's seconds."""
        self.steps = self.rows = self.tokens = self.generated = self.faults = 0
        self.seconds = 0.0
        self._runner = runner
        self._overlap = (
            Overlap(self._launch, self._meanwhile) if isinstance(runner, LaunchRunner) else None
        )
        self._flight: _Flight | None = None
        self._onward: Callable[[], bool] = _always
        self._later: deque[TokenEvent] = deque()
        self._unobserved: list[tuple[float, int, int]] = []
        self._upload = upload
        self._deliver = deliver
        self._clock = clock
        self._observer = observer
        self._crowded: Counter[str] = Counter()
        self._since: dict[str, float] = {}
        self._admitted: dict[str, Admission] = {}

    def add(self, request: Request, *, since: float | None = None) -> None:
        """Queue a request that was submitted at `since`. Raises what the scheduler's `add` does."""
        self.scheduler.add(request)
        self._since[request.id] = self._clock() if since is None else since

    def abort(self, request_id: str) -> None:
        """End a request without an event, if it is open; none of its own is delivered any more."""
        self._forget(request_id)
        if self._later:
            self._later = deque(e for e in self._later if e.request_id != request_id)
        self.scheduler.abort(request_id)

    @property
    def under_way(self) -> bool:
        """Whether the next turn's step has begun: nothing may happen to its rows before that."""
        return self._flight is not None

    def turn(self, *, onward: Callable[[], bool] = _always) -> bool:
        """One step; False when there was none to do. Raises EngineFault on a broken device.

        onward  asked once this step is under way: whether the next may begin, too
        """
        started = self._clock()
        self._onward = onward
        flight = self._flight
        if flight is not None and any(row.sequence.blocks for row in flight.plan.rows):
            self._step(flight.plan, started)
            return True
        self._flight = None
        plan = self.scheduler.plan()
        for event in self.scheduler.take_refused():
            self._emit(event)
        if plan is None:
            self.flush()
            if not self.scheduler.waiting:
                self.progress_at = started
            return False
        if self._since:
            self._time_admissions(plan, started)
        ready = self._bring_in(plan) if plan.uploads else plan
        if ready is not None:
            self._step(arrived(ready, self._copies), started)
        else:
            self.flush()
        return True

    def flush(self) -> None:
        """Deliver what was kept for the time in which a step is under way."""
        while self._later:
            self._deliver(self._later.popleft())
        for told in self._unobserved:
            self._observer.on_step(*told)
        self._unobserved.clear()

    def _launch(self, plan: Plan) -> Launched:
        """The step, which may have begun a turn ago."""
        flight, self._flight = self._flight, None
        if flight is not None:
            return flight.launched
        assert isinstance(self._runner, LaunchRunner)
        return self._runner.launch(plan)

    def _meanwhile(self, plan: Plan, launched: Launched | None) -> None:
        """While a step is under way: begin the next, tell of the last."""
        begin = None if launched is None else launched.ahead
        if begin is not None and self._onward():
            following = self.scheduler.ahead(plan)
            if following is not None:
                try:
                    self._flight = _Flight(following, begin(following))
                except Exception:  # noqa: BLE001 - it costs nobody anything: its turn comes
                    _log.warning("a step could not begin ahead of its turn\n%s", format_exc())
        self.flush()

    def _step(self, plan: Plan, started: float) -> None:
        outcome = run_isolated(self._runner, plan, overlap=self._overlap)
        if outcome.failed or outcome.crowded or outcome.lost is not None:
            self._flight = None  # it began from tokens that nobody will see
        if outcome.lost is not None:
            raise EngineFault("the device is lost") from outcome.lost
        for part, results in outcome.done:
            for event in self.scheduler.commit(part, results):
                self._emit(event)
        for sequence, error in outcome.crowded:
            if sequence.blocks:  # one that ended while its step was under way holds nothing
                self._make_room(sequence, error)
        for sequence, error in outcome.failed:
            self._fail(sequence, "the engine failed on this request; others go on", error)
        if outcome.failed and not outcome.done:
            broken = probe(self._runner)
            if broken is not None:
                raise EngineFault("the device fails on every request") from broken
        self._count(outcome.done, started)

    def _time_admissions(self, plan: Plan, now: float) -> None:
        """Requests in their first plan have waited until now; later preemptions do not count."""
        for row in plan.rows:
            since = self._since.pop(row.sequence.request.id, None)
            if since is not None:
                lane = "delta" if row.lane is None else "merged"
                self._admitted[row.sequence.request.id] = Admission(max(0.0, now - since), lane)

    def _count(self, done: list[tuple[Plan, list[RowResult]]], started: float) -> None:
        now = self._clock()
        rows = sum(len(part.rows) for part, _ in done)
        tokens = sum(part.tokens for part, _ in done)
        self.steps += 1
        self.seconds += now - started
        self.rows += rows
        self.tokens += tokens
        if rows:
            self.progress_at = now
        self._unobserved.append((now - started, rows, tokens))
        if self._overlap is None:
            self.flush()

    def _bring_in(self, plan: Plan) -> Plan | None:
        """The plan without the rows whose adapters could not be copied to the device."""
        lost = upload_isolated(self._upload, plan.uploads)
        if not lost:
            return plan
        dropped: set[int] = set()
        for index, row in enumerate(plan.rows):
            error = next((lost[v] for v in row.sequence.adapters if v in lost), None)
            if error is not None:
                dropped.add(index)
                self._fail(row.sequence, "an adapter could not be brought to the device", error)
        for version in lost:  # the pool took it for present: let the next request bring it again
            self.scheduler.pool.forget(version)
        return without(plan, dropped)

    def _make_room(self, sequence: Sequence, error: Exception) -> None:
        """The newest row of a step without memory steps back, or fails when it did so before."""
        request_id = sequence.request.id
        self._crowded[request_id] += 1
        if self._crowded[request_id] > _OOM_PREEMPTIONS:
            self._fail(sequence, "the device has too little memory for this request", error)
        else:
            self.scheduler.preempt(sequence)

    def _fail(self, sequence: Sequence, message: str, cause: Exception) -> None:
        fault = EngineFault(message)
        fault.__cause__ = cause
        for event in self.scheduler.fail(sequence.request.id, fault):
            self._emit(event)

    def _emit(self, event: TokenEvent) -> None:
        if event.token is not None:
            self.generated += 1
        if event.error is not None:
            self.faults += 1
        if event.request_id in self._admitted:
            event = replace(event, admitted=self._admitted.pop(event.request_id))
        if event.finish is not None or event.error is not None:
            self._forget(event.request_id)
        if self._overlap is None:
            self._deliver(event)
        else:
            self._later.append(event)

    def _forget(self, request_id: str) -> None:
        self._crowded.pop(request_id, None)
        self._since.pop(request_id, None)
        self._admitted.pop(request_id, None)
