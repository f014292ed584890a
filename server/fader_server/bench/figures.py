"""From samples to figures: what one repeat measured, and many repeats together."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fader_server.bench.client import Sample
from fader_server.bench.stats import Spread, Summary, spread, summarise


@dataclass(frozen=True, slots=True)
class Repeat:
    """One measured load. Times in milliseconds, rates per second."""

    requests: int
    wall_s: float
    """From the first request due to the last one ended."""
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    ttft_ms: Summary
    inter_token_ms: Summary | None
    """Between events that carried output; None when no request had two."""
    tpot_ms: Summary | None
    """Per request: time after the first token over the tokens after it."""
    latency_ms: Summary
    tokens_per_event: float
    """1 when each token came in an event of its own; above, inter_token_ms is of larger units."""
    client_busy: float
    """CPU seconds of the client over wall seconds: near 1, the client is what was measured."""


def measure(samples: Sequence[Sample], *, client_cpu_s: float) -> Repeat:
    """Figures of one repeat. Every sample must be without fault, and there must be one."""
    assert samples
    assert not any(sample.fault for sample in samples)
    wall = max(s.end for s in samples) - min(s.due for s in samples)
    tokens = sum(s.output_tokens for s in samples)
    ttft = summarise((s.token_times[0] - s.due) * 1e3 for s in samples)
    latency = summarise((s.end - s.due) * 1e3 for s in samples)
    assert ttft is not None
    assert latency is not None
    return Repeat(
        requests=len(samples),
        wall_s=wall,
        output_tokens=tokens,
        output_tokens_per_s=tokens / wall,
        requests_per_s=len(samples) / wall,
        ttft_ms=ttft,
        inter_token_ms=summarise(
            (b - a) * 1e3 for s in samples for a, b in pairwise(s.token_times)
        ),
        tpot_ms=summarise(
            (s.token_times[-1] - s.token_times[0]) * 1e3 / (s.output_tokens - 1)
            for s in samples
            if s.output_tokens > 1
        ),
        latency_ms=latency,
        tokens_per_event=tokens / sum(len(s.token_times) for s in samples),
        client_busy=client_cpu_s / wall,
    )


def headline(repeat: Repeat) -> dict[str, float]:
    """The figures that are compared, by name; a higher rate is better, a higher time worse."""
    figures = {
        "output_tokens_per_s": repeat.output_tokens_per_s,
        "requests_per_s": repeat.requests_per_s,
    }
    for name in ("ttft_ms", "inter_token_ms", "tpot_ms", "latency_ms"):
        summary: Summary | None = getattr(repeat, name)
        if summary is not None:
            figures |= {
                f"{name}_p50": summary.p50,
                f"{name}_p95": summary.p95,
                f"{name}_p99": summary.p99,
            }
    return figures


def across(repeats: Sequence[Repeat]) -> dict[str, Spread]:
    """Median, least and greatest of every headline figure over the repeats."""
    rows = [headline(repeat) for repeat in repeats]
    return {name: spread(row[name] for row in rows) for name in rows[0]}


def ratios(repeats: Sequence[Repeat], reference: Sequence[Repeat]) -> dict[str, Spread]:
    """Every headline figure over the reference's: the ratio of medians.

    Least and greatest are of the ratios within one round, whose loads ran next to each other.
    """
    rows, references = [headline(r) for r in repeats], [headline(r) for r in reference]
    result = {}
    for name in rows[0].keys() & references[0].keys():
        above, below = [row[name] for row in rows], [row[name] for row in references]
        if not all(below):
            continue
        within = [a / b for a, b in zip(above, below, strict=True)]
        middle = statistics.median(above) / statistics.median(below)
        result[name] = Spread(median=middle, low=min(within), high=max(within))
    return dict(sorted(result.items()))
