"""What is remembered of calls: one record each, for metrics and the log line. No texts, no keys."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fader_server.api.adapter_ports import Adapters, LeasedTerm
from fader_server.api.gaps import Gaps
from fader_server.api.merge_ports import Merging
from fader_server.api.named_blends import Recipe, Recipes
from fader_server.api.ports import Engine, TenantStats
from fader_server.api.resolve import exact
from fader_server.api.traffic import BlendKey, Traffic, blend_key
from fader_server.core import Admission, LaneName
from fader_server.metrics import (
    Metrics,
    by_tier,
    cache_config_info,
    counter,
    gauge,
    lora_requests_info,
)

MERGE_STAGES = ("merging", "measuring", "failed", "refused")


@dataclass(slots=True)
class CallRecord:
    """One generation call, from its lease to its end."""

    metrics: Metrics
    board: "Board"
    clock: Callable[[], float] = time.monotonic
    began: float = 0.0
    adapter: str = ""
    """Empty until the names are resolved."""
    terms: Sequence[LeasedTerm] = ()
    blend: BlendKey = ()
    """What its tokens are counted for; those that no lane could draw, as the base's."""
    recipe: Recipe | None = None
    not_invoked: Sequence[str] = ()
    """Activated adapters that do not apply, for a prompt lacks their invocation."""
    first: float | None = None
    queue: float | None = None
    """Seconds that the call's slowest choice so far waited for its place in a step."""
    tokens: tuple[int, int, int] = (0, 0, 0)
    """Prompt, completion, cached."""
    outcome: str = ""
    _lanes: set[LaneName] = field(default_factory=set)
    _gaps: dict[int, Gaps] = field(default_factory=dict)
    """By choice."""

    def __post_init__(self) -> None:
        self.began = self.clock()

    @property
    def started(self) -> bool:
        """The first token is there."""
        return self.first is not None

    def leased(
        self,
        adapter: str,
        terms: Sequence[LeasedTerm],
        *,
        recipe: Recipe | None = None,
        merges: bool = True,
    ) -> None:
        """`merges`: weights could be made of the blend."""
        self.adapter, self.terms, self.recipe = adapter, terms, recipe
        self.blend = blend_key(terms) if merges else ()
        self.board.waiting.update(self._names())

    def token(self, choice: int) -> None:
        """A token of the choice with this number came."""
        now = self.clock()
        if self.board.traffic is not None:
            self.board.traffic.add(self.blend, self.terms)
        if self.first is None:
            self.first = now
            self.metrics.first(self.adapter, now - self.began)
            self.board.waiting.subtract(self._names())
            self.board.running.update(self._names())
        gaps = self._gaps.get(choice)
        if gaps is None:
            self._gaps[choice] = Gaps(self.metrics.inter_token.observe, now)
        else:
            gaps.token(now)

    def admitted(self, admission: Admission) -> None:
        """One choice has begun to run."""
        self.metrics.queue.observe(admission.queued)
        self.queue = max(admission.queued, self.queue or 0.0)
        self._lanes.add(admission.lane)

    @property
    def lane(self) -> str | None:
        """The lanes of the choices that have begun, with commas between; None: none has."""
        return ", ".join(sorted(self._lanes)) or None

    def used(self, prompt: int, completion: int, cached: int) -> None:
        self.tokens = (prompt, completion, cached)

    def end(self, outcome: str) -> None:
        """The call is over; only the first end counts."""
        if self.outcome:
            return
        self.outcome = outcome
        for gaps in self._gaps.values():
            gaps.tell()
        if not self.adapter:
            return
        (self.board.running if self.started else self.board.waiting).subtract(self._names())
        prompt, completion, _ = self.tokens
        seconds = self.clock() - self.began
        self.metrics.ended(
            self.adapter, outcome, seconds=seconds, prompt=prompt, completion=completion
        )

    def _names(self) -> list[str]:
        return [term.name for term in self.terms]

    def log_fields(self) -> dict[str, Any]:
        first = None if self.first is None else round((self.first - self.began) * 1000, 1)
        queue = None if self.queue is None else round(self.queue * 1000, 1)
        return {
            "adapter": self.adapter or None,
            "lane": self.lane,
            "recipe": self.recipe and f"{self.recipe.name}@{self.recipe.digest[:12]}",
            "versions": [f"{term.name}@{term.version[:12]}" for term in self.terms],
            "weights": [exact(term.weight) for term in self.terms],
            "not_invoked": list(self.not_invoked),
            "prompt_tokens": self.tokens[0],
            "completion_tokens": self.tokens[1],
            "cached_tokens": self.tokens[2],
            "queue_ms": queue,
            "first_ms": first,
            "outcome": self.outcome or None,
        }


@dataclass(slots=True)
class Board:
    """Calls by adapter name, before and after their first token."""

    waiting: Counter[str] = field(default_factory=Counter)
    running: Counter[str] = field(default_factory=Counter)
    traffic: Traffic | None = None
    """Where tokens are counted by blend, if anybody asks."""

    def names(self) -> tuple[list[str], list[str]]:
        """Names with calls: running, waiting. Forgets those without."""
        for table in (self.waiting, self.running):
            for name in [name for name, count in table.items() if count <= 0]:
                del table[name]
        return sorted(self.running), sorted(self.waiting)


def merge_gauges(merging: Merging, engine: Engine) -> Callable[[], Iterable[Metric]]:
    """The families of the merged lane, read at every scrape."""

    def read() -> Iterable[Metric]:
        status, stats = merging.status(), engine.stats()
        job, lane = status.job, status.lane
        states = GaugeMetricFamily(
            "fader_merge_state", "1 for what the merged lane is now.", labels=["state"]
        )
        now = {"ready": lane is not None, "none": lane is None and not status.busy}
        now |= {stage: job is not None and job.stage == stage for stage in MERGE_STAGES}
        for state, holds in now.items():
            states.add_metric([state], float(holds))
        yield states
        done = job.progress if job is not None and status.busy else float(lane is not None)
        yield gauge("fader_merge_progress", "Of the merge under way, 0 to 1.", done)
        held = status.leaving_bytes + (lane.bytes if lane else 0)
        yield gauge("fader_merge_bytes", "Memory held by merged lanes.", held)
        yield gauge("fader_merge_requests", "Open requests in merged lanes.", status.requests)
        tokens = CounterMetricFamily(
            "fader_merge_tokens", "Tokens drawn by the engine, by lane.", labels=["lane"]
        )
        tokens.add_metric(["merged"], stats.merged)
        tokens.add_metric(["delta"], stats.generated - stats.merged)
        yield tokens
        decisions = CounterMetricFamily(
            "fader_merge_decisions", "What --merge auto decided.", labels=["decision"]
        )
        for decision, count in status.decisions.items():
            decisions.add_metric([decision], count)
        yield decisions

    return read


def gauges(
    engine: Engine, adapters: Adapters, recipes: Recipes, board: Board
) -> Callable[[], Iterable[Metric]]:
    """The families read from the engine and the store at every scrape."""

    def read() -> Iterable[Metric]:
        stats, totals = engine.stats(), adapters.totals()
        full = stats.kv_used / stats.kv_total if stats.kv_total else 0.0
        running, waiting = board.names()
        yield gauge("fader_requests_running", "Requests in the batch.", stats.running)
        yield gauge("fader_requests_waiting", "Requests in the queue.", stats.waiting)
        yield gauge("fader_kv_blocks", "KV blocks in all.", stats.kv_total)
        yield gauge("fader_kv_blocks_used", "KV blocks held by requests.", stats.kv_used)
        yield gauge("fader_kv_blocks_cached", "KV blocks kept for reuse.", stats.kv_cached)
        yield counter("fader_prefix_queries", "Prompt blocks looked up.", stats.prefix_queries)
        yield counter("fader_prefix_hits", "Prompt blocks found cached.", stats.prefix_hits)
        yield counter("fader_generated_tokens", "Tokens drawn by the engine.", stats.generated)
        yield counter("fader_guessed_tokens", "Tokens computed before drawn.", stats.guessed)
        yield counter("fader_accepted_tokens", "Guessed tokens that were drawn.", stats.accepted)
        yield counter("fader_preemptions", "Requests put back into the queue.", stats.preemptions)
        yield counter("fader_engine_faults", "Requests ended by a fault.", stats.faults)
        yield gauge("fader_adapters", "Registered adapters.", totals.adapters)
        yield gauge("fader_recipes", "Recipes.", len(recipes.list()))
        yield gauge("fader_adapter_leases", "Leases held by calls.", totals.leases)
        yield by_tier(
            GaugeMetricFamily("fader_adapter_bytes", "Bytes of adapters.", labels=["tier"]),
            totals.host_bytes, totals.device_bytes,
        )  # fmt: skip
        yield by_tier(
            CounterMetricFamily("fader_adapter_evictions", "Evicted adapters.", labels=["tier"]),
            totals.host_evictions, totals.device_evictions,
        )  # fmt: skip
        yield from _by_tenant(stats.tenants)
        yield lora_requests_info(running, waiting, totals.slots)
        yield gauge("vllm:num_requests_running", "Requests in the batch.", stats.running)
        yield gauge("vllm:num_requests_waiting", "Requests in the queue.", stats.waiting)
        yield gauge("vllm:kv_cache_usage_perc", "Share of KV blocks used, 0 to 1.", full)
        yield cache_config_info(stats.block_size, stats.kv_total)

    return read


def _by_tenant(tenants: Mapping[str, TenantStats]) -> Iterable[Metric]:
    """Nothing of callers without a key: they are no tenant."""
    running = GaugeMetricFamily(
        "fader_tenant_requests_running", "Requests in the batch.", labels=["tenant"]
    )
    waiting = GaugeMetricFamily(
        "fader_tenant_requests_waiting", "Requests that never ran.", labels=["tenant"]
    )
    tokens = CounterMetricFamily(
        "fader_tenant_tokens", "Tokens computed: prompts' and drawn.", labels=["tenant"]
    )
    for name, stats in sorted(tenants.items()):
        if name:
            running.add_metric([name], stats.running)
            waiting.add_metric([name], stats.waiting)
            tokens.add_metric([name], stats.tokens)
    return running, waiting, tokens
