"""What a merge benchmark is asked for and what it found. Knows no server."""

from dataclasses import dataclass, field
from typing import Any

from fader_server.bench.discover import Served
from fader_server.bench.figures import Repeat
from fader_server.bench.stats import Spread, Summary, spread
from fader_server.errors import ConfigInvalid

BARS = {"merged_tpot": 1.01, "delta_tpot": 1.02, "merging_p99": 1.3}
"""Largest ratio that counts as kept: lane to base, with to without an idle lane, p99 while it is
made to p99 without."""


@dataclass(frozen=True, slots=True)
class Options:
    """What to run. ConfigInvalid when it cannot be a benchmark."""

    url: str
    adapter: str | None = None
    """To merge; None: the first."""
    dtype: str = "nf4"
    requests: int = 8
    prompt_tokens: int = 32
    output_tokens: int = 64
    concurrency: int = 1
    repeats: int = 3
    busy_merges: int = 3
    """So many of the rounds end with a merge while streams run."""
    steady_seconds: float = 3.0
    """Of streams without a merge, before each merge under load."""
    idle: bool = False
    """Only merge, once, without streams: for time and memory."""
    timeout: float = 600.0
    seed: int = 0
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("requests", "prompt_tokens", "output_tokens", "concurrency", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigInvalid(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.busy_merges < 0:
            raise ConfigInvalid(f"busy_merges must be 0 or more, got {self.busy_merges}")
        if self.output_tokens < 2:
            raise ConfigInvalid("output_tokens must be at least 2: times are between tokens")


@dataclass(frozen=True, slots=True)
class Merge:
    """One merge, as the server told it."""

    seconds: float
    bytes: int
    busy: bool
    """Streams ran meanwhile."""


@dataclass(slots=True)
class Result:
    """What a run found. With faults there are no figures."""

    served: Served
    adapter: str
    other: str
    faults: list[str] = field(default_factory=list)
    rounds: list[dict[str, Repeat]] = field(default_factory=list)
    """One a repeat: base, merged and delta beside the lane, delta without it."""
    merges: list[Merge] = field(default_factory=list)
    gaps: list[tuple[Summary, Summary]] = field(default_factory=list)
    """Inter-token times in ms without and during a merge, one pair a merge under streams."""
    report: dict[str, Any] = field(default_factory=dict)
    """The last lane's loss report, without its linears."""

    @property
    def ok(self) -> bool:
        return not self.faults

    def ratios(self) -> dict[str, Spread]:
        """The compared figures over the repeats, if there were any. Only of a good run."""
        if not self.rounds:
            return {}

        def over(one: str, other: str) -> Spread:
            return spread(_tpot(found[one]) / _tpot(found[other]) for found in self.rounds)

        ratios = {
            "merged_tpot": over("merged", "base"),
            "delta_tpot": over("delta beside", "delta alone"),
        }
        if self.gaps:
            ratios |= {
                "merging_p99": spread(during.p99 / before.p99 for before, during in self.gaps),
                "merging_p50": spread(during.p50 / before.p50 for before, during in self.gaps),
            }
        return ratios


def _tpot(repeat: Repeat) -> float:
    assert repeat.tpot_ms is not None, "every request has two tokens at least"
    return repeat.tpot_ms.p50
