"""Figures of swaps: an adapter from pinned memory, and what running streams notice of it."""

import time

import torch

from bench.gpu.model import advance, decode_plan
from bench.gpu.section import Result, Rig, Unavailable
from bench.gpu.steps import machine
from bench.gpu.timing import Times
from bench.gpu.weights import adapter_spec, fill
from fader_adapters.pool import Pool
from fader_adapters.spec import AdapterSpec


class _Host:
    """An adapter in pinned memory."""

    def __init__(self, spec: AdapterSpec, flat: torch.Tensor) -> None:
        self.spec, self.flat = spec, flat


def measure_swap(rig: Rig, result: Result) -> None:
    """One adapter from pinned memory, and what running streams notice of twenty."""
    m = machine(rig)
    m.drop_adapters()
    rank, rows = (4, 2) if rig.small else (16, 8)
    hosts = []
    for number in range(2 if rig.small else 4):
        spec = adapter_spec(m.spec, number, rank)
        flat = torch.empty(spec.numel, dtype=rig.dtype, pin_memory=rig.on_gpu)
        fill(flat)
        hosts.append(_Host(spec, flat))
    arena = m.tables.arena
    room = max(host.spec.numel for host in hosts) + 32
    m.tables.arena = arena[:room]  # one at a time: each swap evicts
    try:
        pool = Pool(m.tables)
        swaps, turn = [], 0
        for turn in range(10 if rig.on_gpu else 2):
            started = time.perf_counter()
            _bring(pool, hosts[turn % len(hosts)])
            while pool.late():
                rig.check_time()
            swaps.append((time.perf_counter() - started) * 1e3)
        alone = Times.of(swaps)
        streams = m.streams([()] * rows, 4 if rig.small else m.context - 70)
        gaps: dict[bool, list[float]] = {False: [], True: []}
        for step in range(4 if rig.small else 60):
            plan, swapping = decode_plan(streams), step % 3 == 2
            started = time.perf_counter()
            if swapping and not pool.late():
                turn += 1
                _bring(pool, hosts[turn % len(hosts)])
            results = m.runner.run(plan)
            gaps[swapping].append((time.perf_counter() - started) * 1e3)
            advance(streams, [r.token for r in results])
        pool.join()
    finally:
        m.tables.arena = arena
        m.drop_adapters()
    if not gaps[True]:
        raise Unavailable("no swap took place")
    quiet, during = Times.of(gaps[False]), Times.of(gaps[True])
    nbytes = hosts[0].flat.nbytes
    result.add(
        f"r={rank} swap of {nbytes / 1e6:.0f} MB: {alone.median:.2f} ms; longest gap of {rows} "
        f"streams during {len(gaps[True])} swaps {max(gaps[True]) / quiet.median:.2f}× the median",
        rank=rank,
        nbytes=nbytes,
        longest_gap_ms=round(max(gaps[True]), 4),
        **alone.facts("swap"),
        **quiet.facts("quiet"),
        **during.facts("during"),
    )


def _bring(pool: Pool, host: _Host) -> None:
    uploads = pool.acquire({host.spec.version: host})
    assert uploads is not None
    pool.upload(uploads)
    pool.release((host.spec.version,))
