"""Background work rests while requests run, and ends when nobody wants it."""

import threading

import pytest

from fader_server.pacing import REST, SLICE, Cancelled, Pace


class Desk:
    """A pace whose clock and rests are the test's."""

    def __init__(self, *, busy: bool) -> None:
        self.now = 100.0
        self.rests: list[float] = []
        self.pace = Pace(lambda: busy, clock=lambda: self.now, wait=self._wait)

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.pace()

    def _wait(self, cancelled: threading.Event, seconds: float) -> bool:
        self.rests.append(seconds)
        self.now += 0.25 * SLICE  # waking up is work too, but nobody's slice
        return cancelled.is_set()


def test_work_rests_many_times_as_long_as_it_worked_while_requests_run():
    desk = Desk(busy=True)
    desk.work(50.0)  # what came before the first call is not its work
    for _ in range(3):
        desk.work(0.4 * SLICE)
    assert desk.rests == [pytest.approx(1.2 * SLICE * REST)]
    desk.work(0.9 * SLICE)
    assert len(desk.rests) == 1, "a slice begins after the rest"
    desk.work(2 * SLICE)
    assert desk.rests[1:] == [pytest.approx(2.9 * SLICE * REST)]


def test_idle_work_never_rests():
    desk = Desk(busy=False)
    for _ in range(5):
        desk.work(3 * SLICE)
    assert desk.rests == []


def test_cancelled_work_ends_before_its_next_piece_and_out_of_a_rest():
    idle = Desk(busy=False)
    idle.work(0.0)
    idle.pace.cancel()
    with pytest.raises(Cancelled):
        idle.work(0.0)
    resting = Desk(busy=True)
    resting.work(0.0)
    resting.now += SLICE
    resting.pace._wait = lambda cancelled, seconds: cancelled.set() or True
    with pytest.raises(Cancelled):
        resting.pace()
