"""One merge, from weights to a lane that is ready, at a bounded share of a core."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fader_adapters.aside import Aside
from fader_adapters.changes import Changes
from fader_adapters.lane import MergedLane, Merger
from fader_server.api.adapter_ports import Lease
from fader_server.api.merge_ports import MergeJob, MergeOrder
from fader_server.core import Lane
from fader_server.errors import MergeLossy
from fader_server.model.fidelity import Fidelity, measure
from fader_server.model.loaded import LoadedBase
from fader_server.model.probe import ProbeModel
from fader_server.pacing import Pace

_MERGE_SHARE = 0.8
"""Of the progress figure; the rest is measuring."""


@dataclass(frozen=True)
class Done:
    """A lane that may be published."""

    merged: MergedLane
    fidelity: Fidelity
    report: dict[str, Any]


class Job:
    """The work of one order. `run` belongs to one thread, `told` may be read by any."""

    def __init__(
        self,
        order: MergeOrder,
        lease: Lease,
        merger: Merger,
        changes: Changes,
        *,
        base: LoadedBase,
        probe: Sequence[int],
        pace: Pace,
        aside: Aside,
    ) -> None:
        """aside: of the base's device."""
        self.order = order
        self.lease = lease
        self.merger = merger
        self.pace = pace
        self.lane: Lane | None = None
        """Once it is open."""
        self._changes = changes
        self._base = base
        self._probe = probe
        self._aside = aside
        self.told = MergeJob(
            tuple(lease.terms), lease.blend.digest, order.form, "merging", 0.0, merger.need.total
        )

    def run(self) -> Done:
        """Merge and measure: the lane's weights are there when this returns. Raises MergeLossy,
        Cancelled, AdapterError."""
        total = self.merger.weights
        with self._aside():
            merged = self.merger.run(
                lambda done: self._tell(_MERGE_SHARE * done / total), self.pace
            )
            self.told = replace(self.told, stage="measuring", progress=_MERGE_SHARE)
            probe = ProbeModel(self._base, self.pace)
            fidelity = measure(probe, self._probe, self._changes, merged)
        report = merged.report | {"rounding": self._rounding, "probe": fidelity.document()}
        self.told = replace(self.told, report=report)
        if self.order.form == "nf4" and fidelity.too_lossy and not self.order.force:
            raise MergeLossy(fidelity.too_lossy)
        return Done(merged, fidelity, report)

    @property
    def _rounding(self) -> str:
        return self.order.rounding if self.order.form == "nf4" else "nearest"

    def _tell(self, progress: float) -> None:
        self.told = replace(self.told, progress=progress)


def timed(job: Job) -> tuple[Done, float]:
    """Run it; also the seconds it took, rests included."""
    began = time.monotonic()
    return job.run(), time.monotonic() - began
