import logging
import threading
from concurrent.futures import Future

import pytest

from fader_server.core import Plan, Request, RowResult, TokenEvent
from fader_server.engine.blocks import BlockManager
from fader_server.engine.limits import Limits
from fader_server.engine.loop import Engine
from fader_server.engine.scheduler import Scheduler
from fader_server.errors import ContextTooLong, EngineFault, Overloaded, RequestInvalid
from tests.server.engine.engine_device import Device
from tests.server.engine.engine_world import FakePool, Seen, blend_of, expected, request, version

WAIT = 30.0
"""Seconds until a test that hangs fails."""


class Gate(Device):
    """A device that stands still in a step while closed."""

    def __init__(self, blocks: int, block_size: int) -> None:
        super().__init__(blocks, block_size)
        self.open = threading.Event()
        self.open.set()
        self.inside = threading.Event()

    def run(self, plan: Plan) -> list[RowResult]:
        self.inside.set()
        assert self.open.wait(WAIT)
        return super().run(plan)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Steps:
    def __init__(self) -> None:
        self.seen: list[tuple[float, int, int]] = []

    def on_step(self, seconds: float, rows: int, tokens: int) -> None:
        self.seen.append((seconds, rows, tokens))


class Rig:
    """An engine on a gated device; stops at the end of its `with`, whatever happened."""

    def __init__(self, *, max_waiting: int = 100) -> None:
        self.device = Gate(60, 4)
        self.pool = FakePool(3)
        self.clock, self.observer = Clock(), Steps()
        self.fatal: Future[BaseException] = Future()
        limits = Limits(max_rows=4, chunk_size=8, max_step_tokens=16, max_model_len=64)
        self.scheduler = Scheduler(limits, blocks=BlockManager(60, block_size=4), pool=self.pool)
        self.engine = Engine(
            self.scheduler,
            self.device,
            self.device.upload,
            max_waiting=max_waiting,
            clock=self.clock,
            observer=self.observer,
            on_fatal=self.fatal.set_result,
        )

    def __enter__(self) -> "Rig":
        self.engine.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.device.open.set()
        assert self.engine.stop(WAIT)

    def submit(self, one: Request) -> "Future[Seen]":
        """The future is done when the request has ended."""
        seen, done = Seen(one), Future()

        def sink(event: TokenEvent) -> None:
            seen.take(event)
            if seen.ends:
                done.set_result(seen)

        self.engine.submit(one, sink)
        return done

    def freeze(self, one: Request) -> "Future[Seen]":
        """Submit a request and return while the engine stands still in its step."""
        self.device.open.clear()
        self.device.inside.clear()
        done = self.submit(one)
        assert self.device.inside.wait(WAIT)
        return done

    def assert_empty(self) -> None:
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.kv_used) == (0, 0, 0)
        assert stats.kv_cached + stats.kv_free == stats.kv_total
        assert not +self.pool.pins


def test_requests_from_many_threads_all_get_their_own_tokens():
    with Rig() as rig:
        futures: list[tuple[Request, Future[Seen]]] = []

        def client(number: int) -> None:
            for i in range(8):
                blend = blend_of(("abc"[number % 3], 1.0)) if i % 2 else None
                one = request(f"{number}.{i}", range(i, i + 9), blend=blend, max_tokens=i)
                futures.append((one, rig.submit(one)))

        threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one, future in futures:
            assert future.result(WAIT).tokens == expected(one)
        rig.engine.drain().result(WAIT)
        rig.assert_empty()
    assert len(futures) == 48


def test_what_can_be_checked_without_the_engine_is_refused_at_once():
    with Rig() as rig:
        with pytest.raises(ContextTooLong):
            rig.submit(request("a", range(70)))
        rig.freeze(request("b", (1,)))
        with pytest.raises(RequestInvalid, match="in use"):
            rig.submit(request("b", (1,)))


def test_a_full_queue_refuses_and_has_room_again_later():
    with Rig(max_waiting=2) as rig:
        first = rig.freeze(request("a", (1,), max_tokens=1))
        waiting = [rig.submit(request(n, (1,))) for n in "bc"]
        with pytest.raises(Overloaded, match="2 requests are waiting"):
            rig.submit(request("d", (1,)))
        assert rig.engine.stats().waiting == 2
        rig.device.open.set()
        for future in (first, *waiting):
            future.result(WAIT)
        rig.submit(request("d", (1,))).result(WAIT)


def test_an_aborted_request_gets_no_event_and_gives_everything_back():
    with Rig() as rig:
        running = rig.freeze(request("a", (1,), blend=blend_of(("x", 1.0)), max_tokens=60))
        queued = rig.submit(request("b", (1,)))
        rig.engine.abort("b")
        rig.engine.abort("a")
        rig.engine.abort("nobody")
        rig.device.open.set()
        rig.engine.drain().result(WAIT)
        assert not running.done()
        assert not queued.done()
        rig.assert_empty()


def test_a_fault_fails_its_request_and_the_stream_beside_it_does_not_notice():
    with Rig() as rig:
        good = rig.freeze(request("good", (1, 2), max_tokens=20))
        rig.device.culprits.add("bad")
        bad = rig.submit(request("bad", (3, 4)))
        rig.device.open.set()
        assert isinstance(bad.result(WAIT).error, EngineFault)
        assert good.result(WAIT).tokens == expected(good.result().request)
        stats = rig.engine.stats()
        assert (stats.healthy, stats.faults) == (True, 1)


def test_a_broken_device_fails_every_request_and_marks_the_engine_dead():
    rig = Rig()
    with rig:
        futures = [rig.freeze(request("a", (1,)))]
        futures += [rig.submit(request(f"r{i}", (1,))) for i in range(9)]
        rig.device.broken = True
        rig.device.open.set()
        for future in futures:
            assert isinstance(future.result(WAIT).error, EngineFault)
        assert "every request" in str(rig.fatal.result(WAIT))
        stats = rig.engine.stats()
        assert not stats.healthy
        assert "EngineFault" in stats.reason
        with pytest.raises(EngineFault, match="ended"):
            rig.submit(request("late", (1,)))
        with pytest.raises(EngineFault):
            rig.engine.call(lambda: 1).result(WAIT)
        rig.engine.drain().result(WAIT)


class Panic(BaseException):
    """As libraries in Rust raise."""


def panic() -> None:
    raise Panic


@pytest.mark.parametrize(("broken", "kind"), [(None, TypeError), (panic, Panic)])
def test_a_fault_of_the_scheduler_itself_leaves_nobody_waiting(monkeypatch, broken, kind):
    with Rig() as rig:
        future = rig.freeze(request("a", (1,), max_tokens=9))
        monkeypatch.setattr(rig.scheduler, "plan", broken)
        rig.device.open.set()
        assert isinstance(future.result(WAIT).error, EngineFault)
        assert isinstance(rig.fatal.result(WAIT), kind)
        assert not rig.engine.stats().healthy


def test_a_frozen_engine_is_told_from_a_busy_and_from_an_idle_one():
    with Rig() as rig:
        rig.engine.call(lambda: None).result(WAIT)
        assert rig.engine.stats().stuck(rig.clock.now + 1, after=5) == ""
        future = rig.freeze(request("a", (1,), max_tokens=20))
        rig.clock.now += 6
        assert "not turned for 6 s" in rig.engine.stats().stuck(rig.clock.now, after=5)
        rig.device.open.set()
        future.result(WAIT)
        rig.engine.call(lambda: None).result(WAIT)
        assert rig.engine.stats().stuck(rig.clock.now, after=5) == ""


def test_a_loop_that_turns_without_progress_is_stuck():
    with Rig() as rig:
        rig.pool.acquire = lambda data: None  # never any room
        rig.submit(request("a", (1,), blend=blend_of(("x", 1.0))))
        rig.engine.call(lambda: None).result(WAIT)
        rig.clock.now += 6
        for _ in range(3):  # the loop goes on turning
            rig.engine.call(lambda: None).result(WAIT)
        stats = rig.engine.stats()
        assert "no step was completed for 6 s" in stats.stuck(rig.clock.now, after=5)


def test_a_request_without_room_for_its_adapter_starts_when_there_is():
    with Rig() as rig:
        acquire = rig.pool.acquire
        rig.pool.acquire = lambda data: None
        future = rig.submit(request("a", (1,), blend=blend_of(("x", 1.0))))
        rig.engine.call(lambda: None).result(WAIT)
        rig.pool.acquire = acquire
        assert future.result(WAIT).finish == "length"


def test_drain_refuses_new_requests_and_ends_with_the_last_open_one():
    with Rig() as rig:
        future = rig.freeze(request("a", (1,), max_tokens=20))
        drained = rig.engine.drain()
        with pytest.raises(Overloaded, match="draining"):
            rig.submit(request("b", (1,)))
        assert rig.engine.stats().draining
        assert not drained.done()
        rig.device.open.set()
        drained.result(WAIT)
        assert future.result(0).finish == "length"


def test_stop_ends_open_requests_with_an_error():
    rig = Rig()
    with rig:
        running = rig.freeze(request("a", (1,), blend=blend_of(("x", 1.0)), max_tokens=60))
        queued = rig.submit(request("b", (1,)))
        assert not rig.engine.stop(0.0), "it stands still in a step"
        rig.device.open.set()
        for future in (running, queued):
            assert isinstance(future.result(WAIT).error, Overloaded)
    rig.assert_empty()
    with pytest.raises(Overloaded, match="shutting down"):
        rig.submit(request("c", (1,)))


def test_stop_before_start_ends_what_was_accepted():
    rig = Rig()
    future = rig.submit(request("a", (1,)))
    assert rig.engine.stop()
    assert isinstance(future.result(0).error, Overloaded)


def test_a_sink_that_raises_ends_its_own_request_only(caplog):
    def broken(event: TokenEvent) -> None:
        raise ValueError("injected")

    with Rig() as rig, caplog.at_level(logging.ERROR):
        other = rig.freeze(request("a", (1,), max_tokens=9))
        rig.engine.submit(request("b", (1,), max_tokens=60), broken)
        rig.device.open.set()
        assert other.result(WAIT).finish == "length"
        rig.engine.drain().result(WAIT)
        rig.assert_empty()
    assert "a sink raised" in caplog.text


def test_calls_run_on_the_engine_thread_between_steps():
    with Rig() as rig:
        assert rig.engine.call(lambda: threading.current_thread().name).result(WAIT) == (
            "fader-engine"
        )
        with pytest.raises(ZeroDivisionError):
            rig.engine.call(lambda: 1 // 0).result(WAIT)
        assert rig.engine.stats().healthy


def test_forget_waits_for_the_requests_that_use_the_version():
    with Rig() as rig:
        future = rig.freeze(request("a", (1,), blend=blend_of(("x", 1.0)), max_tokens=5))
        done = threading.Event()
        rig.engine.forget(version("x"), done.set)
        assert not done.is_set()
        rig.device.open.set()
        assert done.wait(WAIT)
        assert future.result(WAIT).tokens == expected(future.result().request)
        rig.engine.call(lambda: None).result(WAIT)
        assert version("x") not in rig.pool.size


def test_every_step_is_observed_and_counted():
    with Rig() as rig:
        rig.submit(request("a", range(12), max_tokens=3)).result(WAIT)
        rig.engine.drain().result(WAIT)
        stats = rig.engine.stats()
    assert [(rows, tokens) for _, rows, tokens in rig.observer.seen] == [
        (1, 8),
        (1, 4),
        (1, 1),
        (1, 1),
    ]
    assert (stats.steps, stats.rows, stats.tokens, stats.generated) == (4, 4, 14, 3)


def test_a_released_engine_thread_is_gone():
    with Rig() as rig:
        rig.submit(request("a", (1,))).result(WAIT)
    assert "fader-engine" not in [t.name for t in threading.enumerate()]
