"""Seconds between tokens: of each choice its own, those that waited together share theirs."""

import pytest

from fader_server.api.gaps import Gaps
from fader_server.api.observe import Board, CallRecord
from fader_server.metrics import Metrics
from tests.server.api.conftest import asgi


def test_tokens_that_came_together_share_what_lies_before_them():
    seen: list[float] = []
    gaps = Gaps(seen.append, 1.0)
    for now in (1.1, 1.4, 1.40001, 1.40002, 1.5):
        gaps.token(now)
    gaps.tell()
    gaps.tell()
    assert seen == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1], abs=1e-4)


def test_steps_faster_than_that_are_told_exactly_in_the_mean():
    seen: list[float] = []
    gaps = Gaps(seen.append, 0.0)
    for step in range(1, 101):
        gaps.token(step * 2e-4)
    gaps.tell()
    assert seen == pytest.approx([2e-4] * 100)


def sums(metrics: Metrics) -> tuple[float, float]:
    """Of the seconds between tokens, and how many there are."""
    lines = dict(line.rsplit(" ", 1) for line in metrics.render().decode().splitlines())
    name = "fader_inter_token_seconds"
    return float(lines[f"{name}_sum"]), float(lines[f"{name}_count"])


def test_each_choice_has_its_own_gaps():
    """Three choices, four steps 0.1 s apart: nine gaps of a step, none of nothing."""
    now = [0.0]
    record = CallRecord(Metrics(), Board(), clock=lambda: now[0])
    record.leased("base", ())
    for step in range(4):
        now[0] = 1.0 + 0.1 * step
        for choice in range(3):
            now[0] += 1e-5
            record.token(choice)
    record.end("ok")
    total, count = sums(record.metrics)
    assert (total, count) == (pytest.approx(0.9, rel=1e-3), 9)
    assert 'fader_inter_token_seconds_bucket{le="0.05"} 0.0' in record.metrics.render().decode()


async def test_a_call_of_several_choices_tells_as_many_gaps_as_they_have(worlds):
    world = worlds()
    async with asgi(world) as client:
        body = {"model": "base", "prompt": "x", "max_tokens": 4, "n": 3}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert sums(world.metrics)[1] == 9
