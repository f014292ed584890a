"""Prometheus metrics in a registry of their own: names and labels, not where numbers arise."""

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"
_FAST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_LONG = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)
_QUEUE = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Labels:
    """Bounds the values of one label: the first `most` keep their name, the rest share `other`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._seen: set[str] = set()

    def of(self, value: str) -> str:
        if value not in self._seen:
            if len(self._seen) >= self._most:
                return OTHER
            self._seen.add(value)
        return value


class Metrics:
    """Counters and histograms that the API moves, and gauges read from `gauges` at a scrape."""

    def __init__(self, *, max_adapter_labels: int = 200) -> None:
        self.registry = CollectorRegistry()
        self._adapters = Labels(max_adapter_labels)
        self.duration = self._histogram("request_duration_seconds", "Whole calls.", _LONG)
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From the call to its first token.", _FAST
        )
        self.queue = self._histogram(
            "queue_seconds", "From a request's submission to its first step.", _QUEUE
        )
        self.inter_token = self._histogram(
            "inter_token_seconds", "Between tokens of a choice.", _STEP
        )
        self._tokens = self._counter("tokens", "Tokens of finished calls.", "direction")
        self._requests = self._counter("requests", "Calls that ended.", "adapter", "outcome")
        self._adapter_tokens = self._counter(
            "adapter_tokens", "Tokens of finished calls by adapter.", "adapter", "direction"
        )
        self._adapter_first = Summary(
            "fader_adapter_time_to_first_token_seconds",
            "From the call to its first token, by adapter.",
            ["adapter"],
            registry=self.registry,
        )
        self._loads = self._counter("adapter_loads", "Loads of adapters.", "result")
        self.load_seconds = Histogram(
            "fader_adapter_load_seconds",
            "Reading, checking and publishing an adapter.",
            ["tier"],
            buckets=_FAST,
            registry=self.registry,
        )
        self._step_seconds = self._histogram("step_seconds", "Steps of the engine.", _STEP)
        self._step_rows = self._histogram("step_rows", "Rows of a step.", _ROWS)
        self._step_tokens = self._counter("step_tokens", "Positions computed in steps.")
        self._http = self._counter("http_responses", "HTTP answers.", "route", "status")
        self._ignored = self._counter("ignored_fields", "Unknown request fields ignored.")

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"fader_{name}", text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"fader_{name}", text, labels, registry=self.registry)

    def answered(self, route: str, status: int) -> None:
        """One HTTP answer; `route` is a template, so its values are bounded."""
        self._http.labels(route, str(status)).inc()

    def ignored(self, fields: int) -> None:
        self._ignored.inc(fields)

    def first(self, adapter: str, seconds: float) -> None:
        """A call's first token. `adapter` is as `label_of` tells it."""
        self.first_token.observe(seconds)
        self._adapter_first.labels(self._adapters.of(adapter)).observe(seconds)

    def ended(
        self, adapter: str, outcome: str, *, seconds: float, prompt: int, completion: int
    ) -> None:
        """A call that had a lease ended: ok, error, timeout, gone, stalled or refused."""
        label = self._adapters.of(adapter)
        self.duration.observe(seconds)
        self._requests.labels(label, outcome).inc()
        for direction, count in (("prompt", prompt), ("completion", completion)):
            self._tokens.labels(direction).inc(count)
            self._adapter_tokens.labels(label, direction).inc(count)

    def on_step(self, seconds: float, rows: int, tokens: int) -> None:
        """One step of the engine, told on the engine thread."""
        self._step_seconds.observe(seconds)
        self._step_rows.observe(rows)
        self._step_tokens.inc(tokens)

    def loaded(self, result: str, seconds: float) -> None:
        """A load ended: `result` is ok or refused."""
        self._loads.labels(result).inc()
        self.load_seconds.labels("host").observe(seconds)

    def add_gauges(self, gauges: Callable[[], Iterable[Metric]]) -> None:
        """Have `gauges` called at every scrape."""
        self.registry.register(_Scrape(gauges))

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)


class _Scrape(Collector):
    def __init__(self, gauges: Callable[[], Iterable[Metric]]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        return self._gauges()

    def describe(self) -> Iterable[Metric]:
        return ()


def gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def by_tier(metric: Metric, host: float, device: float) -> Metric:
    """Add the two tiers' samples to a family made with the label `tier`."""
    assert isinstance(metric, GaugeMetricFamily | CounterMetricFamily)
    metric.add_metric(["host"], host)
    metric.add_metric(["device"], device)
    return metric


def lora_requests_info(running: Iterable[str], waiting: Iterable[str], most: int) -> Metric:
    """The gateway contract: names in labels, the value is the time of the scrape."""
    family = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Adapters of running and waiting requests.",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    family.add_metric([str(most), ",".join(running), ",".join(waiting)], time.time())
    return family


def cache_config_info(block_size: int, blocks: int) -> Metric:
    """The gateway contract: how a picker cuts prompts into blocks, and how many a server holds."""
    family = GaugeMetricFamily(
        "vllm:cache_config_info", "Blocks of the KV cache.", labels=["block_size", "num_gpu_blocks"]
    )
    family.add_metric([str(block_size), str(blocks)], 1.0)
    return family
