"""The engine thread: plan, upload, run, commit. Moves token ids; knows nothing of text or HTTP.

What others ask for runs between two steps, never beside one: an abort, a lane or a lost version
meets no row under way. No step begins ahead of its turn while somebody has asked.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Self, TypeVar

from fader_adapters.errors import AdapterError
from fader_adapters.spec import Digest, Upload
from fader_server.core import Request, Runner, Sink, TokenEvent
from fader_server.engine.arrivals import Copies
from fader_server.engine.scheduler import Scheduler
from fader_server.engine.stats import EngineStats, StepObserver, TenantStats, Unobserved
from fader_server.engine.stepper import Stepper
from fader_server.errors import EngineFault, FaderError, Overloaded, RequestInvalid, TenantBusy

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_BEAT_SECONDS = 1.0
"""An idle loop still turns this often, so that a stuck one is told from an idle one."""
_RETRY_SECONDS = 0.02
"""How soon to ask again when nothing runs and the pool has no room for who waits."""


class Engine:
    """Owns the device. Every method may be called from any thread; sinks run on the engine's.

    Every accepted request ends in exactly one event with `finish` or `error`. Only `abort`
    ends one without: events that were under way may still arrive, none does afterwards.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        upload: Callable[[tuple[Upload, ...]], None],
        *,
        max_waiting: int = 256,
        max_waiting_of: Mapping[str, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
        observer: StepObserver | None = None,
        on_fatal: Callable[[BaseException], None] = lambda error: None,
        copies: Copies | None = None,
    ) -> None:
        """max_waiting: requests that were accepted and do not run; max_waiting_of: of one tenant
        that were never admitted, for those that have a limit of their own; see also `counted`."""
        self._scheduler = scheduler
        self._stepper = Stepper(
            scheduler,
            runner,
            upload,
            deliver=self._deliver,
            clock=clock,
            observer=observer or Unobserved(),
            copies=copies,
        )
        self._max_waiting = max_waiting
        self._max_waiting_of = max_waiting_of or {}
        self._clock = clock
        self._on_fatal = on_fatal
        self._thread = threading.Thread(target=self._main, name="fader-engine", daemon=True)
        self._inbound: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()  # guards the next six between submitters and the end
        self._sinks: dict[str, Sink] = {}
        self._queued: Counter[str] = Counter()
        self._elsewhere: Counter[str] = Counter()
        self._draining = False
        self._closed: FaderError | None = None
        self._fatal = ""
        self._stopping = False
        self._idle = False
        self._drains: list[Future[None]] = []
        self._beat_at = clock()

    def start(self) -> None:
        """Start the thread. Once."""
        self._thread.start()

    def submit(self, request: Request, sink: Sink, *, further: bool = False) -> None:
        """Accept a request. further: another choice of a call that was accepted, which counts once
        against its tenant's limit.

        Raises RequestInvalid, ContextTooLong, AdapterTooLarge, Overloaded, TenantBusy or
        EngineFault.
        """
        self._scheduler.check(request)
        with self._lock:
            if self._closed is not None:
                raise type(self._closed)(str(self._closed))
            if self._draining:
                raise Overloaded("the server is draining: send the request to another one")
            tenant = request.tenant
            if not further:
                self._check_own(tenant)
            if self._queued.total() + self._scheduler.waiting >= self._max_waiting:
                raise Overloaded(f"{self._max_waiting} requests are waiting: try again later")
            if request.id in self._sinks:
                raise RequestInvalid(f"request id {request.id!r} is in use")
            self._sinks[request.id] = sink
            self._queued[tenant] += 1
            self._inbound.put(partial(self._accept, request, self._clock()))

    @contextmanager
    def counted(self, tenant: str) -> Iterator[None]:
        """Count one that waits elsewhere before it comes here among its tenant's. Raises
        TenantBusy."""
        with self._lock:
            self._check_own(tenant)
            self._elsewhere[tenant] += 1
        try:
            yield
        finally:
            with self._lock:
                self._elsewhere[tenant] -= 1

    def _check_own(self, tenant: str) -> None:
        most = self._max_waiting_of.get(tenant)
        own = self._queued[tenant] + self._elsewhere[tenant] + self._scheduler.waiting_of(tenant)
        if most is not None and own >= most:
            raise TenantBusy(f"{most} requests of yours are waiting: try again later")

    def limit_waiting(self, max_waiting_of: Mapping[str, int]) -> None:
        """Other limits of the tenants, see the constructor."""
        self._max_waiting_of = max_waiting_of

    def abort(self, request_id: str) -> None:
        """End a request without an event; nothing happens when it has ended already."""
        self._inbound.put(partial(self._abort, request_id))

    def call(self, function: Callable[[], _T]) -> "Future[_T]":
        """Run a function on the engine thread between two steps. What it raises, the future has."""
        future: Future[_T] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._closed is None:
                self._inbound.put(partial(self._call, function, future))
                return future
        future.set_exception(EngineFault("the engine has ended"))
        return future

    def forget(self, version: Digest, done: Callable[[], None]) -> None:
        """Drop a version from the device once no request uses it; then `done`, on any thread."""
        future = self.call(partial(self._scheduler.pool.forget, version))
        future.add_done_callback(lambda _: done())

    def drain(self) -> "Future[None]":
        """Refuse new requests; the future is done when the last accepted one has ended."""
        drained: Future[None] = Future()
        drained.set_running_or_notify_cancel()
        with self._lock:
            self._draining = True
            if self._closed is None:
                self._inbound.put(partial(self._drains.append, drained))
                return drained
        drained.set_result(None)
        return drained

    def stop(self, timeout: float | None = None) -> bool:
        """End the thread after its step; open requests get an error event. False: still busy."""
        if self._thread.ident is None:
            self._close(Overloaded("the server never started"))
            return True
        self._inbound.put(self._stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def busy(self) -> bool:
        """Whether requests run."""
        return self._scheduler.running > 0

    def _tenants(self) -> dict[str, TenantStats]:
        """The scheduler's, with those that wait before they come to it."""
        found = self._scheduler.tenants()
        with self._lock:
            before = +(self._queued + self._elsewhere)
        for tenant, waiting in before.items():
            known = found.get(tenant, TenantStats(running=0, waiting=0, tokens=0))
            found[tenant] = replace(known, waiting=known.waiting + waiting)
        return found

    def stats(self) -> EngineStats:
        """A snapshot, from any thread, without waiting for the engine's."""
        blocks, stepper = self._scheduler.blocks, self._stepper
        cached, free, lookup = blocks.cached, blocks.free, self._scheduler.lookup
        return EngineStats(
            healthy=not self._fatal,
            reason=self._fatal,
            draining=self._draining,
            beat_at=self._beat_at,
            progress_at=stepper.progress_at,
            running=self._scheduler.running,
            waiting=self._scheduler.waiting + self._queued.total(),
            kv_total=blocks.total,
            kv_used=blocks.total - cached - free,
            kv_cached=cached,
            kv_free=free,
            block_size=blocks.block_size,
            prefix_queries=blocks.queries,
            prefix_hits=blocks.hits,
            steps=stepper.steps,
            step_seconds=stepper.seconds,
            rows=stepper.rows,
            tokens=stepper.tokens,
            generated=stepper.generated,
            merged=self._scheduler.merged,
            guessed=lookup.guessed,
            accepted=lookup.accepted,
            preemptions=self._scheduler.preemptions,
            faults=stepper.faults,
            tenants=self._tenants(),
        )

    def _main(self) -> None:
        end: FaderError = Overloaded("the server is shutting down: send the request again")
        try:
            while not self._stopping:
                self._beat_at = self._clock()
                self._idle = not self._turn()
                if self._drains and not self._sinks:
                    self._end_drains()
        except BaseException as error:  # noqa: BLE001 - the thread's border: nobody may be left waiting
            _log.critical("the engine ended", exc_info=error)
            self._fatal = f"the engine ended after {type(error).__name__}"
            end = EngineFault("the engine ended after a fault of its device")
            self._close(end)
            self._on_fatal(error)
        else:
            self._close(end)

    def _turn(self) -> bool:
        """What others asked for, then a step; False when there was none to do."""
        if not self._stepper.under_way:
            self._obey()
        return self._stepper.turn(onward=self._inbound.empty)

    def _obey(self) -> None:
        """Run what other threads asked for; wait for it when there is nothing else to do."""
        if self._idle:
            wait = _RETRY_SECONDS if self._scheduler.waiting else _BEAT_SECONDS
            with suppress(Empty):
                self._inbound.get(timeout=wait)()
        while not self._inbound.empty():
            self._inbound.get()()

    def _deliver(self, event: TokenEvent) -> None:
        request_id = event.request_id
        sink = self._sinks.get(request_id)
        if event.finish is not None or event.error is not None:
            self._sinks.pop(request_id, None)
        if sink is None:
            return
        try:
            sink(event)
        except Exception as error:  # noqa: BLE001 - one reader's fault must not end the others
            _log.error("a sink raised; its request is aborted", exc_info=error)
            self._abort(request_id)

    def _accept(self, request: Request, since: float) -> None:
        try:
            if self._closed is None:
                self._stepper.add(request, since=since)
        except (RequestInvalid, AdapterError) as error:
            self._deliver(TokenEvent(request.id, error=error))
        finally:
            with self._lock:
                self._queued[request.tenant] -= 1

    def _abort(self, request_id: str) -> None:
        self._stepper.abort(request_id)
        self._sinks.pop(request_id, None)

    def _call(self, function: Callable[[], _T], future: "Future[_T]") -> None:
        try:
            if self._closed is not None:
                raise EngineFault("the engine has ended")
            future.set_result(function())
        except Exception as error:  # noqa: BLE001 - it belongs to the caller
            future.set_exception(error)

    def _stop(self) -> None:
        self._stopping = True

    def _close(self, end: FaderError) -> None:
        """Refuse everything from now on; end what is open with `end`."""
        with self._lock:
            self._closed = end
        self._stepper.flush()  # what was decided before still counts
        while not self._inbound.empty():
            self._inbound.get()()
        for request_id in list(self._sinks):
            with suppress(Exception):  # after a fault the scheduler's state may be anything
                self._stepper.abort(request_id)
            self._deliver(TokenEvent(request_id, error=end))
        self._end_drains()

    def _end_drains(self) -> None:
        for drained in self._drains:
            drained.set_result(None)
        self._drains.clear()
