"""The merged lane of one server: checks orders, makes lanes in the background, opens, closes.

Implements the API's Merging. What the engine does with a lane is its own business.
"""

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from fader_adapters.aside import Aside
from fader_adapters.changes import Changes
from fader_adapters.errors import AdapterError, BlendInvalid
from fader_adapters.lane import Merger
from fader_adapters.merged_site import LaneSpec
from fader_server.api.adapter_ports import Lease
from fader_server.api.merge_ports import LaneInfo, MergeJob, MergeOrder, MergeStage, MergeStatus
from fader_server.api.traffic import Traffic
from fader_server.core import Lane
from fader_server.engine.lanes import Lanes
from fader_server.engine.loop import Engine
from fader_server.errors import FaderError, MergeBusy, MergeLossy, MergeNoMemory, MergeNotFound
from fader_server.mergejob import Done, Job, timed
from fader_server.model.loaded import LoadedBase
from fader_server.model.probe import probe_bytes
from fader_server.model.runner import ModelRunner
from fader_server.pacing import Cancelled, Pace

_log = logging.getLogger(__name__)
_CLOSE_SECONDS = 10.0


@dataclass(frozen=True)
class Parts:
    """What a merged lane is made from and put into."""

    base: LoadedBase
    runner: ModelRunner
    lanes: Lanes
    engine: Engine
    free: Callable[[], int]
    """Bytes that can be had now."""
    unreserved: int
    """Bytes that were free once the base was there, less arena and KV cache."""
    probe: Sequence[int]
    """Tokens of the probe text."""


class MergedLanes:
    """At most one lane is open and one merge under way."""

    def __init__(self, parts: Parts, *, traffic: Traffic | None = None) -> None:
        self.traffic = traffic
        self.decisions: Counter[str] = Counter()
        """What a policy did; counted by it, told in the status."""
        self._parts = parts
        self._aside = Aside(parts.base.device)
        self._lock = threading.Lock()  # guards the next four between loop, merge and engine
        self._job: Job | None = None
        self._ended: MergeJob | None = None
        self._lane: tuple[Lane, LaneInfo] | None = None
        self._held: dict[Lane, int] = {}
        self._thread: threading.Thread | None = None

    def status(self) -> MergeStatus:
        with self._lock:
            job, lane = self._job, self._lane
            leaving = sum(self._held.values()) - (lane[1].bytes if lane else 0)
            return MergeStatus(
                lane=None if lane is None else lane[1],
                job=self._ended if job is None else job.told,
                requests=self._parts.lanes.members,
                leaving_bytes=leaving,
                decisions=dict(self.decisions),
            )

    async def start(self, order: MergeOrder, lease: Lease) -> MergeStatus:
        """Begin to merge in the background; see the port."""
        try:
            self._refuse_busy()
            job = self._prepare(order, lease, busy=lambda: self._parts.engine.busy)
        except BaseException:
            lease.release()
            raise
        if job is None:
            lease.release()
        else:
            self._launch(job)
        return self.status()

    def start_now(self, order: MergeOrder, lease: Lease) -> None:
        """The same before the server serves; returns when the lane is open.

        Raises MergeNoMemory, MergeLossy, AdapterError.
        """
        try:
            job = self._prepare(order, lease, busy=lambda: False)
            assert job is not None, "no lane is open at start"
            done, seconds = timed(job)
            self._parts.engine.call(partial(self._open, job, done, seconds)).result()
        finally:
            lease.release()

    async def drop(self) -> MergeStatus:
        """End the merge under way, else close the lane; see the port."""
        with self._lock:
            job, lane, thread = self._job, self._lane, self._thread
            ended, self._ended = self._ended, None
        if job is not None:
            assert thread is not None
            job.pace.cancel()
            await asyncio.to_thread(thread.join)
            if job.lane is not None:  # it was past the last look at whether it is wanted
                await self._close(job.lane)
        elif lane is not None:
            await self._close(lane[0])
        elif ended is None:
            raise MergeNotFound("nothing is merged: there is no lane to drop")
        return self.status()

    def close(self) -> None:
        """End the merge under way, if any. Before the engine ends."""
        with self._lock:
            job, thread = self._job, self._thread
        if job is not None and thread is not None:
            job.pace.cancel()
            thread.join(_CLOSE_SECONDS)

    def _refuse_busy(self) -> None:
        with self._lock:
            job = self._job
        if job is not None:
            raise MergeBusy(
                f"a merge is {job.told.stage}, {job.told.progress:.0%} done: wait for it, or end "
                "it with DELETE /v1/merge"
            )

    def _prepare(self, order: MergeOrder, lease: Lease, *, busy: Callable[[], bool]) -> Job | None:
        """Check everything that can be checked before; None: such a lane is open already."""
        if not lease.blend:
            raise BlendInvalid("the blend is empty, which is the base: name adapters to merge")
        parts, base = self._parts, self._parts.base
        spec = LaneSpec(lease.blend, order.form, order.rounding)
        with self._lock:
            if self._lane is not None and self._lane[0].key == spec.key:
                return None
        changes = Changes(lease.blend, lease.adapters, base.installed.spec)
        merger = Merger(
            base.installed, base.backend, changes, spec, dtype=base.dtype, device=base.device
        )
        need = merger.need
        work = max(need.scratch, probe_bytes(base, len(parts.probe), 3))
        with self._lock:
            room = min(parts.free(), parts.unreserved - sum(self._held.values()))
        if need.lane + work > room:
            raise MergeNoMemory(
                f"the lane needs {need.lane} bytes and {work} more while it is made, "
                f"{max(room, 0)} are free beside base, arena and KV cache; start with a smaller "
                "--kv-cache or --arena"
            )
        return Job(
            *(order, lease, merger, changes),
            base=base, probe=parts.probe, pace=Pace(busy), aside=self._aside,
        )  # fmt: skip

    def _launch(self, job: Job) -> None:
        thread = threading.Thread(target=self._work, args=(job,), name="fader-merge", daemon=True)
        with self._lock:
            self._job, self._ended, self._thread = job, None, thread
        fields = {"blend": job.told.digest[:12], "dtype": job.told.form, "bytes": job.told.bytes}
        _log.info("merge started", extra={"fields": fields})
        thread.start()

    def _work(self, job: Job) -> None:
        stage: MergeStage = "failed"
        reason = ""
        try:
            done, seconds = timed(job)
            self._parts.engine.call(partial(self._open, job, done, seconds)).result()
        except Cancelled:
            _log.info("merge ended early", extra={"fields": {"blend": job.told.digest[:12]}})
        except MergeLossy as error:
            stage, reason = "refused", str(error)
        except (AdapterError, FaderError) as error:
            reason = str(error)
        except BaseException as error:  # noqa: BLE001 - the border of a thread; a native panic too
            _log.exception("the merge failed")
            reason = f"a fault inside the server: {type(error).__name__}"
        job.lease.release()
        ended = replace(job.told, stage=stage, reason=reason) if reason else None
        if ended is not None:
            fields = {"blend": ended.digest[:12], "stage": stage, "reason": reason}
            _log.warning("merge without a lane", extra={"fields": fields})
        with self._lock:
            self._job, self._ended = None, ended

    def _open(self, job: Job, done: Done, seconds: float) -> None:
        """On the engine thread, or before it serves: one command, and the lane is there. Raises
        Cancelled."""
        if job.pace.cancelled:
            raise Cancelled
        parts, merged = self._parts, done.merged
        lane = Lane(merged.spec.blend.digest, merged.spec.key)
        info = LaneInfo(
            terms=job.told.terms,
            digest=lane.blend,
            key=lane.key,
            form=merged.spec.form,
            bytes=merged.weights.nbytes,
            seconds=seconds,
            created=int(time.time()),
            report=done.report,
        )
        with self._lock:
            self._held[lane] = merged.weights.nbytes
            self._lane = (lane, info)
            job.lane = lane
        parts.runner.add_lane(lane, merged.weights)
        parts.lanes.replace(lane, partial(self._gone, lane))
        fields = {
            "blend": lane.blend[:12],
            "dtype": info.form,
            "bytes": info.bytes,
            "seconds": round(seconds, 3),
            "relative_error": done.report["overall"]["relative_error"],
            "kl": done.fidelity.kl,
            "top1": done.fidelity.top1,
        }
        _log.info("lane opened", extra={"fields": fields})

    async def _close(self, lane: Lane) -> None:
        """Unless another has taken its place."""
        if await asyncio.wrap_future(self._parts.engine.call(partial(self._close_lane, lane))):
            _log.info("lane closed", extra={"fields": {"blend": lane.blend[:12]}})

    def _close_lane(self, lane: Lane) -> bool:
        """On the engine thread; whether it was open."""
        with self._lock:
            if self._lane is None or self._lane[0] != lane:
                return False
            self._lane = None
        self._parts.lanes.replace(None)
        return True

    def _gone(self, lane: Lane) -> None:
        """On the engine thread; the memory is given back elsewhere, which may take a while."""
        weights, ended = [self._parts.runner.drop_lane(lane)], self._aside.reached()

        def free() -> None:
            ended()  # its last step may still be under way
            weights.clear()
            with self._lock:
                del self._held[lane]

        threading.Thread(target=free, name="fader-free", daemon=True).start()
