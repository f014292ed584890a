"""Connections beside a limit of open files: as many as fit, and what is told of the rest."""

import asyncio
import logging
import resource

import pytest

from fader_server import descriptors
from fader_server.descriptors import MOST_REFUSED, make_places, places_in, told_seldom


@pytest.mark.parametrize("limit", [0, 20, 60, 256, 1024, 4096, 1 << 20])
@pytest.mark.parametrize("used", [0, 30, 300])
@pytest.mark.parametrize("wanted", [1, 8, 2048])
def test_what_is_open_together_stays_within_the_limit(limit, used, wanted):
    places = places_in(limit, used=used, wanted=wanted)
    assert 1 <= places.connections <= wanted
    assert 0 <= places.refused <= MOST_REFUSED
    assert used + places.connections + places.refused <= max(limit, used + 1)


def test_a_stock_limit_leaves_most_to_connections_and_a_high_one_all_that_was_asked_for():
    assert 600 < places_in(1024, used=40, wanted=2048).connections < 1024 - 40
    assert places_in(4096, used=40, wanted=2048) == descriptors.Places(2048, MOST_REFUSED)


@pytest.fixture
def limits(monkeypatch):
    """The process's, as the program sees them."""
    now = {"soft": 1024, "hard": 1 << 20}

    def put(_: int, pair: tuple[int, int]) -> None:
        if now.get("strict"):
            raise ValueError("not allowed to raise maximum limit")
        now["soft"], now["hard"] = pair

    monkeypatch.setattr(resource, "getrlimit", lambda _: (now["soft"], now["hard"]))
    monkeypatch.setattr(resource, "setrlimit", put)
    return now


@pytest.mark.parametrize("hard", [1 << 20, resource.RLIM_INFINITY])
def test_the_soft_limit_is_raised_as_far_as_it_must(limits, caplog, hard):
    limits["hard"] = hard
    assert make_places(2048).connections == 2048
    assert 2048 + MOST_REFUSED < limits["soft"] < 4096
    assert limits["hard"] == hard
    assert not caplog.records


@pytest.mark.parametrize("soft", [8192, resource.RLIM_INFINITY])
def test_a_limit_that_is_high_enough_is_left_alone(limits, soft):
    limits["soft"] = soft
    assert make_places(2048).connections == 2048
    assert limits["soft"] == soft


@pytest.mark.parametrize("bound", [{"hard": 1500}, {"strict": True}])
def test_where_the_system_gives_less_fewer_connections_are_told_once(limits, caplog, bound):
    limits |= bound
    places = make_places(2048)
    assert places.connections + places.refused < limits["soft"] == bound.get("hard", 1024)
    (record,) = caplog.records
    assert record.fields["connections"] == places.connections
    assert record.fields["open_files"] == limits["soft"]


async def test_a_listener_without_descriptors_is_told_now_and_then_and_all_else_as_ever(
    caplog, monkeypatch
):
    loop, now = asyncio.get_running_loop(), 100.0
    monkeypatch.setattr(loop, "time", lambda: now)
    handle = told_seldom()
    full = {"message": "socket.accept() out of system resource", "exception": OSError(24, "full")}
    for _ in range(1000):
        handle(loop, full)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    now += descriptors._TELL_SECONDS
    handle(loop, full)
    assert len(caplog.records) == 2
    handle(loop, {"message": "something else"})
    assert caplog.records[-1].name == "asyncio"
