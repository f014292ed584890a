import asyncio
import threading

import pytest
from engine_world import request
from test_engine_loop import WAIT, Rig

from fader_server.core import Request, Sink, TokenEvent
from fader_server.engine.stream import TokenStream
from fader_server.errors import ContextTooLong, Overloaded


class Script:
    """An engine that does what the test says; keeps the sink and counts the aborts."""

    def __init__(self, refuse: Exception | None = None) -> None:
        self.refuse = refuse
        self.sink: Sink | None = None
        self.aborts: list[str] = []

    def submit(self, request: Request, sink: Sink) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.sink = sink

    def abort(self, request_id: str) -> None:
        self.aborts.append(request_id)

    def send(self, *events: TokenEvent) -> None:
        """From another thread, all at once, as a step of the engine would."""
        assert self.sink is not None
        thread = threading.Thread(target=lambda: [self.sink(e) for e in events])  # type: ignore[misc]
        thread.start()
        thread.join()


class Lease:
    def __init__(self) -> None:
        self.released = 0

    def __call__(self) -> None:
        self.released += 1


def token(number: int, *, last: bool = False) -> TokenEvent:
    return TokenEvent("a", number, finish="length" if last else None)


def opened(script: Script, lease: Lease) -> TokenStream:
    return TokenStream.open(script, request("a", (1,)), release=lease)


async def test_events_come_in_order_and_end_with_the_last():
    script, lease = Script(), Lease()
    async with opened(script, lease) as stream:
        script.send(token(1), token(2), token(3, last=True))
        assert [e.token async for e in stream] == [1, 2, 3]
        assert [e.token async for e in stream] == []
    assert (lease.released, script.aborts) == (1, [])


async def test_a_waiting_reader_wakes_for_each_event():
    script, lease = Script(), Lease()
    async with opened(script, lease) as stream:
        for number in range(3):
            reader = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            assert not reader.done()
            script.send(token(number))
            assert (await asyncio.wait_for(reader, WAIT)).token == number


async def test_a_backlog_wakes_the_loop_once_and_is_taken_at_once(monkeypatch):
    script, lease = Script(), Lease()
    async with opened(script, lease) as stream:
        loop = asyncio.get_running_loop()
        wakes = []
        schedule = loop.call_soon_threadsafe
        monkeypatch.setattr(
            loop, "call_soon_threadsafe", lambda *a: (wakes.append(a), schedule(*a))[1]
        )
        script.send(*(token(i) for i in range(50)))
        assert (await anext(stream)).token == 0
        assert [e.token for e in stream.ready()] == list(range(1, 50))
        assert stream.ready() == []
        assert len(wakes) == 1
        script.send(token(50))
        assert (await anext(stream)).token == 50
        assert len(wakes) == 2


async def test_leaving_early_aborts_and_releases_once():
    script, lease = Script(), Lease()
    async with opened(script, lease) as stream:
        script.send(token(1))
        assert (await anext(stream)).token == 1
    await stream.aclose()
    assert (lease.released, script.aborts) == (1, ["a"])


async def test_events_after_leaving_are_dropped():
    script, lease = Script(), Lease()
    async with opened(script, lease) as stream:
        pass
    script.send(token(1), token(2, last=True))
    await asyncio.sleep(0)
    assert [e async for e in stream] == []
    assert (lease.released, script.aborts) == (1, ["a"])


async def test_the_lease_ends_with_the_request_even_if_nobody_reads():
    script, lease = Script(), Lease()
    async with opened(script, lease) as stream:
        script.send(token(1), TokenEvent("a", error=Overloaded("x")))
        await asyncio.sleep(0)
        assert lease.released == 1
        assert [(e.token, type(e.error)) async for e in stream] == [
            (1, type(None)),
            (None, Overloaded),
        ]
    assert (lease.released, script.aborts) == (1, [])


async def test_a_refused_request_releases_its_lease():
    lease = Lease()
    with pytest.raises(ContextTooLong):
        opened(Script(refuse=ContextTooLong("x")), lease)
    assert lease.released == 1


async def test_a_cancelled_reader_aborts_its_request():
    script, lease = Script(), Lease()

    async def read() -> None:
        async with opened(script, lease) as stream:
            await anext(stream)

    task = asyncio.ensure_future(read())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (lease.released, script.aborts) == (1, ["a"])


def test_an_engine_outlives_the_loop_of_its_reader():
    script, lease = Script(), Lease()

    async def leave_open() -> None:
        opened(script, lease)

    asyncio.run(leave_open())
    script.send(token(1), token(2, last=True))


async def test_a_stream_reads_what_the_engine_wrote():
    with Rig() as rig:
        lease = Lease()
        one = request("a", (1, 2, 3), max_tokens=30)
        async with TokenStream.open(rig.engine, one, release=lease) as stream:
            tokens = [e.token async for e in stream]
        assert len(tokens) == 30
        assert lease.released == 1
        async with TokenStream.open(
            rig.engine, request("b", (1,), max_tokens=60), release=lease
        ) as stream:
            await anext(stream)
        await asyncio.wrap_future(rig.engine.drain())
        rig.assert_empty()
    assert lease.released == 2
