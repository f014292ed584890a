"""What the engine tells about itself: a snapshot for any thread, a hook for every step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class TenantStats:
    """One tenant at one moment."""

    running: int
    waiting: int
    """Never admitted so far, wherever they wait."""
    tokens: int
    """Prompt tokens computed when it was admitted and tokens drawn, none of them twice."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges and counters at one moment. Each is exact; together they may be a step apart."""

    healthy: bool
    """False once a fault of the device or the engine itself ended the loop."""
    reason: str
    """Why it is not healthy; empty while it is."""
    draining: bool
    beat_at: float
    """Clock, in seconds, of the loop's last turn. Turns come at least once a second."""
    progress_at: float
    """Clock, in seconds, when a step was last committed or nothing was there to do."""
    running: int
    waiting: int
    """Accepted, not running: queued for the engine thread, or for blocks, rows or adapters."""
    kv_total: int
    """Blocks; the next three add up to it."""
    kv_used: int
    kv_cached: int
    kv_free: int
    block_size: int
    """Tokens of one block."""
    prefix_queries: int
    """Full prompt blocks of admitted requests."""
    prefix_hits: int
    """Blocks of those found in the cache."""
    steps: int
    step_seconds: float
    rows: int
    tokens: int
    """Computed positions, prompt and output, recomputed ones and guesses included."""
    generated: int
    merged: int
    """Of the generated tokens, those drawn in a merged lane."""
    guessed: int
    """Tokens that were computed before they were drawn, from what their texts held already."""
    accepted: int
    """Of those, the ones that were drawn."""
    preemptions: int
    faults: int
    """Requests ended by an error after they were accepted."""
    tenants: Mapping[str, TenantStats] = field(default_factory=dict)
    """Those that asked for something since the start."""

    def stuck(self, now: float, after: float) -> str:
        """Why the loop counts as stuck at `now`, given `after` seconds of patience; else empty."""
        if now - self.beat_at > after:
            return f"the engine loop has not turned for {now - self.beat_at:.0f} s"
        if now - self.progress_at > after:
            return f"no step was completed for {now - self.progress_at:.0f} s"
        return ""


class StepObserver(Protocol):
    """Called on the engine thread after every step; must return at once and never raise."""

    def on_step(self, seconds: float, rows: int, tokens: int) -> None: ...


class Unobserved:
    """The observer of an engine without metrics."""

    def on_step(self, seconds: float, rows: int, tokens: int) -> None:
        """Ignore the step."""
