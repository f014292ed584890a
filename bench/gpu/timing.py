"""Times of device work: medians over repetitions, launches hidden behind a captured graph."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.gpu.section import Rig

Work = Callable[[], object]
L2_BYTES = 200 << 20
"""Weights that take turns add up to more than this, so that none is read from a cache."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: the median, and the fifth and ninety-fifth percentile."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> "Times":
        ordered = sorted(milliseconds)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered),
            ordered[round(0.05 * last)],
            ordered[round(0.95 * last)],
            len(ordered),
        )

    def facts(self, name: str) -> dict[str, float]:
        return {f"{name}_ms": round(self.median, 5), f"{name}_p95_ms": round(self.high, 5)}


def turns(nbytes: int, rig: Rig) -> int:
    """How many weights of this size must take turns."""
    return 2 if rig.small else max(2, -(-L2_BYTES // nbytes))


def captured(rig: Rig, works: Sequence[Work], repeats: int = 20) -> Times:
    """Time of one of `works`, all of them captured in one graph and replayed; eager on a CPU."""
    if not rig.on_gpu:
        return Times.of([_seconds(work) * 1e3 for work in works])
    stream = _stream(rig)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for work in works:
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [work() for work in works]
    graph.replay()
    times = events(rig, graph.replay, repeats)
    del kept
    count = len(works)
    return Times(times.median / count, times.low / count, times.high / count, repeats)


def _stream(rig: Rig) -> torch.cuda.Stream:
    """One for all captures of a process: torch has so few that a new one each time would some day
    be the one that the captured work forks to."""
    if "stream" not in rig.kept:
        rig.kept["stream"] = torch.cuda.Stream(rig.device)
    return rig.kept["stream"]


def events(rig: Rig, work: Work, repeats: int = 20) -> Times:
    """Device time of `work`, between two events a call."""
    if not rig.on_gpu:
        return Times.of([_seconds(work) * 1e3 for _ in range(2)])
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return Times.of(found)


def _seconds(work: Work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def bandwidth(rig: Rig) -> float:
    """Bytes a second of a large copy on the device, read and written together; once a process."""
    if "bandwidth" not in rig.kept:
        size = 1 << 20 if rig.small else 2 << 30
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=rig.device)
        target = torch.empty_like(source)
        target.copy_(source)
        times = events(rig, lambda: target.copy_(source), 10)
        rig.kept["bandwidth"] = 2 * size / (times.median * 1e-3)
    return rig.kept["bandwidth"]
