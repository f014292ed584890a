"""Decode steps that begin before the last one's tokens are known, against steps one by one."""

import time
from collections.abc import Sequence

from bench.gpu.model import Machine, Terms, advance, decode_plan
from bench.gpu.section import ParityFailed, Result, Rig, Unavailable
from bench.gpu.steps import decode, demand_graphs, floor_ms, machine
from bench.gpu.timing import Times
from fader_server.core import Launched
from fader_server.core import Sequence as Stream
from fader_server.engine.following import one_on

STEPS = 40
WARM = 3


def measure_ahead(rig: Rig, result: Result) -> None:
    """The same tokens, and the time from one step's results to the next one's."""
    demand_graphs(rig)
    m = machine(rig)
    if m.graphs is None:
        raise Unavailable(f"the model was not captured: {m.told}")
    (slot,) = m.add_adapters(1, 4 if rig.small else 16)
    steps = STEPS if rig.on_gpu else 2
    for rows in (2,) if rig.small else (1, 8, 32):
        for own in ((), ((slot, 1.0),)):
            rig.check_time()
            terms = [own] * rows
            one_by_one = _tokens(m, terms, steps)
            streams = _streams(m, terms, steps)
            times = _onward(m, streams, steps)
            if [s.tokens[-steps:] for s in streams] != one_by_one:
                raise ParityFailed(f"{rows} rows drew other tokens when their steps began ahead")
            if one_by_one == _tokens(m, terms, steps, shift=1):
                raise ParityFailed("the comparison does not notice other tokens")
            plain, floor = decode(m, terms), floor_ms(m, rows)
            result.add(
                f"{rows} rows{' with an adapter' if own else ''}, ahead: {times.median:.2f} ms, "
                f"{times.median / plain.median:.2f}× one by one, {times.median / floor:.2f}× its "
                "bytes",
                rows=rows,
                adapter=bool(own),
                byte_floor_ms=round(floor, 4),
                **times.facts("ahead"),
                **plain.facts("one_by_one"),
            )
    m.drop_adapters()


def _streams(m: Machine, terms: Sequence[Terms], steps: int, *, shift: int = 0) -> list[Stream]:
    streams = m.streams(terms, max(4, m.context - steps - 8))
    for stream in streams:
        stream.tokens[-1] = (stream.tokens[-1] + shift) % m.shape.vocab
    return streams


def _tokens(m: Machine, terms: Sequence[Terms], steps: int, *, shift: int = 0) -> list[list[int]]:
    """What so many steps draw, each begun when the last one's tokens were there."""
    streams = _streams(m, terms, steps, shift=shift)
    for _ in range(steps):
        advance(streams, [r.token for r in m.runner.run(decode_plan(streams))])
    return [stream.tokens[-steps:] for stream in streams]


def _onward(m: Machine, streams: Sequence[Stream], steps: int) -> Times:
    """Milliseconds between results; the streams get the tokens."""
    plan = decode_plan(streams)
    launched: Launched = m.runner.launch(plan)
    found, last = [], time.perf_counter()
    for step in range(steps):
        ahead = None
        if step < steps - 1:
            plan = one_on(plan)
            assert launched.ahead is not None
            ahead = launched.ahead(plan)
        advance(streams, [r.token for r in launched.results()])
        now = time.perf_counter()
        if step >= WARM or not m.rig.on_gpu:
            found.append((now - last) * 1e3)
        last = now
        if ahead is not None:
            launched = ahead
    return Times.of(found)
