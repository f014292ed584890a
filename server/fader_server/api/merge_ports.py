"""What the API needs from the merged lane, and nothing more; as `ports` is for the rest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from fader_adapters.spec import Digest
from fader_server.api.adapter_ports import Lease, LeasedTerm
from fader_server.api.traffic import Traffic

MergeForm = Literal["nf4", "bf16"]
"""nf4: the base's size and speed; bf16: exact up to rounding, in the activations' type."""
MergeRounding = Literal["keep", "plain"]
"""How nf4 is rounded: so that the delta is kept, or each weight to its nearest code."""
MergeStage = Literal["merging", "measuring", "failed", "refused"]


@dataclass(frozen=True, slots=True)
class MergeOrder:
    """How to make a merged lane of a blend."""

    form: MergeForm = "nf4"
    rounding: MergeRounding = "keep"
    force: bool = False
    """Also when 4 bits lose too much."""


@dataclass(frozen=True, slots=True)
class MergeJob:
    """A merge under way, or the last one if it did not come to a lane."""

    terms: Sequence[LeasedTerm]
    digest: Digest
    form: MergeForm
    stage: MergeStage
    progress: float
    """0 to 1."""
    bytes: int
    """Memory that the lane will hold, its making included."""
    reason: str = ""
    """Why it failed or was refused."""
    report: Mapping[str, Any] | None = None
    """What was measured before it was refused."""


@dataclass(frozen=True, slots=True)
class LaneInfo:
    """The lane that is ready."""

    terms: Sequence[LeasedTerm]
    digest: Digest
    key: Digest
    form: MergeForm
    bytes: int
    seconds: float
    """The merge took."""
    created: int
    """Unix seconds."""
    report: Mapping[str, Any]
    """What rounding costs: overall, by linear, on the probe text."""


@dataclass(frozen=True, slots=True)
class MergeStatus:
    """The merged lane of this server at one moment."""

    lane: LaneInfo | None = None
    job: MergeJob | None = None
    requests: int = 0
    """Open in any merged lane, one that is leaving included."""
    leaving_bytes: int = 0
    """Held by replaced lanes until their last request ends."""
    decisions: Mapping[str, int] = field(default_factory=dict)
    """How often `--merge auto` merged and dropped."""

    @property
    def busy(self) -> bool:
        return self.job is not None and self.job.stage in ("merging", "measuring")


class Merging(Protocol):
    """The merged lane. Every method belongs to the event loop; none blocks it."""

    @property
    def traffic(self) -> Traffic | None:
        """Where calls tell which blends they use; None: nobody asks."""
        ...

    async def start(self, order: MergeOrder, lease: Lease) -> MergeStatus:
        """Begin to merge what is leased in the background; the lease is taken over, also by an
        error. A lane of the very same kind is left as it is.

        Raises MergeBusy, MergeNoMemory, AdapterError; nothing is changed then.
        """
        ...

    async def drop(self) -> MergeStatus:
        """End the merge under way, else close the lane. Raises MergeNotFound."""
        ...

    def status(self) -> MergeStatus: ...
