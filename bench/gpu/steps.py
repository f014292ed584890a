"""Figures of whole steps by the server's own runner: decode by rows, prompts, swaps."""

import time
from collections.abc import Sequence
from contextlib import suppress

import torch

from bench.gpu.figures import shape_of
from bench.gpu.model import Machine, Terms, advance, decode_plan
from bench.gpu.parity import demand
from bench.gpu.section import BitsDiffer, ParityFailed, Result, Rig, Unavailable
from bench.gpu.timing import Times, bandwidth, events
from bench.gpu.weights import rms
from fader_server.core import Lane, Plan

STEPS = 40


def machine(rig: Rig) -> Machine:
    """One model a process, shared by its sections. Raises Unavailable where making it failed."""
    if "no machine" in rig.kept:
        raise Unavailable(f"the model could not be made: {rig.kept['no machine']}")
    if "machine" not in rig.kept:
        shape = shape_of(rig)
        rows, context = (4, 48) if rig.small else (64, 1200)
        linears = sum(w + o for w, outs in shape.sites for o in outs) * shape.layers
        arena = (3 if rig.small else 40) * 24 * linears
        try:
            prompts = 16 if rig.small else 1024
            rig.kept["machine"] = Machine(
                rig, shape, rows=rows, context=context, arena=arena, prompts=prompts
            )
        except Exception as error:
            rig.kept["no machine"] = f"{type(error).__name__}: {error}"[:200]
            raise
    return rig.kept["machine"]


def check_graphs(rig: Rig, result: Result) -> None:
    """A replay gives the bits of the model's own code, with deltas and without, full or padded."""
    m = machine(rig)
    if m.graphs is None:
        raise ParityFailed(f"the model was not captured: {m.told}")
    m.drop_adapters()
    slots = m.add_adapters(2, 16 if not rig.small else 4)
    checked, other_bits = 0, []
    for rows in (1, 3) if rig.small else (1, 2, 3, 8, 17, 32, 64):
        for terms in ([()] * rows, [((slots[i % 2], 1.0),) for i in range(rows)]):
            rig.check_time()
            plan = decode_plan(m.streams(terms, m.context - 9 - rows))
            replayed, eager = both_ways(m, plan)
            demand(rms(replayed, eager), 1e-2, f"a replay of {rows} rows")
            if not torch.equal(replayed, eager):
                other_bits.append(f"{rows} rows with {len(terms[0])} terms")
            checked += 1
    plan = decode_plan(m.streams([()], 9))
    other = decode_plan(m.streams([((slots[0], 1.0),)], 9))
    if torch.equal(both_ways(m, plan)[0], both_ways(m, other)[0]):
        raise ParityFailed("the comparison does not notice an adapter")
    rig.kept["graphs checked"] = True
    alone = _other_in_company(m, slots)
    m.drop_adapters()
    if other_bits or alone:
        raise BitsDiffer(
            f"replays with other bits than the model's code: {other_bits or 'none'}; rows with "
            f"other bits alone than in company: {alone or 'none'}"
        )
    result.add(
        f"{checked} replays = the model's own code, bit for bit; {m.told}",
        replays_checked=checked,
        captured=m.told,
    )


def _other_in_company(m: Machine, slots: Sequence[int]) -> list[int]:
    """Rows whose logits alone have other bits than among others."""
    rows = 3 if m.rig.small else 17
    terms: list[Terms] = [((slots[i % 2], 1.0),) if i % 3 else () for i in range(rows)]
    streams = m.streams(terms, 9)
    together, _ = both_ways(m, decode_plan(streams))
    found = []
    for row in (0, 1, rows - 1):
        alone, _ = both_ways(m, decode_plan(streams[row : row + 1]))
        if not torch.equal(alone[0], together[row]):
            found.append(row)
    return found


def demand_graphs(rig: Rig) -> None:
    """No figure of steps before replays were compared with the model's code in this process."""
    if rig.kept.get("graphs checked") or machine(rig).graphs is None:
        return
    with suppress(BitsDiffer):  # told by their own section
        check_graphs(rig, Result())


def both_ways(m: Machine, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits by the captured graph and operator by operator over the same padded rows."""
    found = m.graphs
    assert found is not None
    with torch.inference_mode():
        step = m.base.backend.prepare(m.tables, plan.terms)
        replayed = found.run(plan, step, refuse).clone()
        bucket = next(size for size, _ in found.captured if size >= len(plan.rows))
        eager = m.runner._rows(found._inputs.batch(bucket), step)[: len(plan.rows)]
    if not replayed.isfinite().all():
        raise ParityFailed("logits are not finite")
    return replayed, eager


def refuse(batch: object) -> torch.Tensor:
    raise ParityFailed("a step that should be captured is not")


def decode(
    m: Machine, terms: Sequence[Terms], *, steps: int = STEPS, lane: Lane | None = None
) -> Times:
    """Wall time of the runner's step, sampling and its one synchronisation included."""
    at = m.context - steps - 8
    streams = m.streams(terms, max(4, at))
    for stream in streams:
        stream.lane = lane
    found = []
    for turn in range((steps if m.rig.on_gpu else 1) + 3):
        plan = decode_plan(streams)
        started = time.perf_counter()
        results = m.runner.run(plan)
        if turn >= 3 or not m.rig.on_gpu:
            found.append((time.perf_counter() - started) * 1e3)
        advance(streams, [r.token for r in results])
        if not m.rig.on_gpu:
            break
    return Times.of(found)


def floor_ms(m: Machine, rows: int) -> float:
    """Bytes a step must read over the copy bandwidth: weights, output layer, keys and values."""
    keys = rows * (m.context - STEPS) * m.shape.kv_bytes
    head = m.shape.vocab * m.shape.hidden * m.rig.dtype.itemsize
    return (m.base.installed.nbytes + head + keys) / bandwidth(m.rig) * 1e3


def measure_decode(rig: Rig, result: Result) -> None:
    """Whole steps on the base by rows, against the bytes they must read."""
    demand_graphs(rig)
    m = machine(rig)
    for rows in (1, 2) if rig.small else (1, 2, 4, 8, 16, 32, 64):
        rig.check_time()
        times = decode(m, [()] * rows)
        plan = decode_plan(m.streams([()] * rows, m.context - STEPS))
        device, graphs = times, m.graphs
        if graphs is not None:
            bucket = next(size for size, _ in graphs.captured if size >= rows)
            with torch.inference_mode():
                graphs._inputs.fill(plan, bucket)
                device = events(rig, graphs._graphs[bucket, "base"])
        floor = floor_ms(m, rows)
        result.add(
            f"decode {rows} rows: {times.median:.2f} ms ({device.median:.2f} on the device), "
            f"{times.median / floor:.2f}× its bytes, {rows / times.median * 1e3:.0f} tokens/s",
            rows=rows,
            context=m.context - STEPS,
            byte_floor_ms=round(floor, 4),
            **times.facts("step"),
            **device.facts("graph"),
        )


def measure_adapters(rig: Rig, result: Result) -> None:
    """Whole steps with adapters over the same rows on the base, in turn."""
    demand_graphs(rig)
    m = machine(rig)
    rank = 4 if rig.small else 16
    alone = decode(m, [()] * (2 if rig.small else 32))
    slots = m.add_adapters(2 if rig.small else 32, rank)
    loads: dict[str, list[Terms]] = {}
    for rows in (2,) if rig.small else (1, 8, 32):
        loads[f"{rows} rows, {rows} adapters"] = [((slots[i], 1.0),) for i in range(rows)]
        loads[f"{rows} rows, one adapter"] = [((slots[0], 1.0),)] * rows
        loads[f"{rows} rows, {rows} adapters, two terms"] = [
            tuple(sorted(((slots[i], 0.7), (slots[(i + 1) % len(slots)], -0.3))))
            for i in range(rows)
        ]
    for name, terms in loads.items():
        rig.check_time()
        base, adapted = decode(m, [()] * len(terms)), decode(m, terms)
        ratio = adapted.median / base.median
        result.add(
            f"{name}, r={rank}: {ratio:.3f}× the base",
            load=name,
            rank=rank,
            ratio=round(ratio, 4),
            **base.facts("base"),
            **adapted.facts("adapted"),
        )
    idle = decode(m, [()] * (2 if rig.small else 32))
    ratio = idle.median / alone.median
    result.add(
        f"base rows beside resident adapters: {ratio:.3f}× without any",
        load="base rows, adapters resident",
        ratio=round(ratio, 4),
    )
    m.drop_adapters()
