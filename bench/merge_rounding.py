"""What merging the demo's adapters into 4 bits loses, by rounding and by the size of the delta.

PYTHONPATH=server:adapters python -m bench.merge_rounding [--gammas 1,0.3,0.1] [--out FILE]

Every lane is made as the server makes it and measured on the server's own probe text. KL is of the
merged lane's logits from the unmerged blend's, in nats; base: what the blend changes at all.
"""

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from fader_server import config, demo
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.api.merge_ports import LaneInfo, MergeOrder
from fader_server.bench.machine import machine_facts
from fader_server.launch import World
from fader_server.metrics import Metrics
from fader_server.world import open_world

LANES = (MergeOrder("nf4", "plain", True), MergeOrder("nf4", "keep", True), MergeOrder("bf16"))


@dataclass(frozen=True, slots=True)
class Row:
    """One lane of one adapter."""

    adapter: str
    gamma: float
    lane: str
    relative_delta: float
    """‖Δ‖ / ‖W‖ over its linears."""
    relative_error: float
    """‖W' − (W + Δ)‖ / ‖Δ‖"""
    kl: float
    top1: float
    base_kl: float


def open_demo() -> AbstractContextManager[World]:
    """The demo's world on one thread."""
    return open_world(config.load({"threads": "1"}, {}), Metrics())


async def lane_of(world: World, name: str, gamma: float, order: MergeOrder) -> LaneInfo:
    """Merge one adapter and wait for the lane."""
    assert world.merging is not None
    lease = world.adapters.acquire([NamedTerm(AdapterRef(name), gamma)])
    status = await world.merging.start(order, lease)
    while status.busy:
        await asyncio.sleep(0.002)
        status = world.merging.status()
    assert status.lane is not None, status.job
    return status.lane


async def measure(world: World, names: Sequence[str], gammas: Sequence[float]) -> list[Row]:
    """One row an adapter, γ and kind of lane."""
    rows = []
    for gamma in gammas:
        for name in names:
            for order in LANES:
                lane = await lane_of(world, name, gamma, order)
                overall, probe = lane.report["overall"], lane.report["probe"]
                rows.append(
                    Row(
                        adapter=name,
                        gamma=gamma,
                        lane=order.rounding if order.form == "nf4" else "bf16",
                        relative_delta=overall["delta_norm"] / overall["weight_norm"],
                        relative_error=overall["relative_error"],
                        kl=probe["kl"],
                        top1=probe["top1"],
                        base_kl=probe["base_kl"],
                    )
                )
    return rows


def ratio(rows: Sequence[Row], gamma: float) -> float:
    """Geometric mean over the adapters of KL with `keep` over KL with `plain`."""
    kl = {(row.adapter, row.lane): row.kl for row in rows if row.gamma == gamma}
    logs = [math.log(kl[name, "keep"] / kl[name, "plain"]) for name, lane in kl if lane == "keep"]
    return math.exp(sum(logs) / len(logs))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gammas", default="1,0.3,0.1")
    parser.add_argument("--adapters", default=",".join(demo.adapter_dirs()))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    gammas = [float(text) for text in given.gammas.split(",")]
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    with open_demo() as world:
        rows = asyncio.run(measure(world, given.adapters.split(","), gammas))
    print(f"{'adapter':10} {'γ':>4} {'lane':6} {'‖Δ‖/‖W‖':>8} {'error':>7} {'KL':>9} {'top-1':>6}")
    for row in rows:
        print(
            f"{row.adapter:10} {row.gamma:4g} {row.lane:6} {row.relative_delta:8.3f} "
            f"{row.relative_error:7.3f} {row.kl:9.5f} {row.top1:6.1%}  (base {row.base_kl:.4f})"
        )
    means = {f"{gamma:g}": ratio(rows, gamma) for gamma in gammas}
    for gamma, mean in means.items():
        print(f"γ {gamma}: KL with keep is {mean:.3f} of KL with plain (geometric mean)")
    if given.out is not None:
        document = {
            "format": "fader-merge-rounding/1",
            "started_at": started,
            "seconds": round(time.monotonic() - began, 1),
            "machine": machine_facts(),
            "keep_over_plain_kl": means,
            "rows": [asdict(row) for row in rows],
        }
        given.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
