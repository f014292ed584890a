"""Events cross from the engine's thread to the loop, with one call for all that a step fills."""

import asyncio
import threading

from fader_server.api.mailbox import Bell, Mailbox
from fader_server.core import TokenEvent


class CountingLoop:
    """The running loop, whose calls across threads are counted."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.calls = 0

    def call_soon_threadsafe(self, *work):
        self.calls += 1
        return self._loop.call_soon_threadsafe(*work)


def in_a_thread(work) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


async def test_a_step_that_fills_many_mailboxes_calls_the_loop_once():
    loop = CountingLoop()
    bell = Bell(loop)
    boxes = [Mailbox(bell) for _ in range(8)]

    def step() -> None:
        for i, box in enumerate(boxes):
            box.post(TokenEvent(str(i), token=1))
            box.post(TokenEvent(str(i), token=2))

    for turn in (1, 2):
        in_a_thread(step)
        assert loop.calls == turn
        for i, box in enumerate(boxes):
            events = await asyncio.wait_for(box.take(), 5)
            assert [(e.request_id, e.token) for e in events] == [(str(i), 1), (str(i), 2)]


async def test_nothing_is_lost_when_posts_race_with_readers():
    bell = Bell(asyncio.get_running_loop())
    boxes = [Mailbox(bell) for _ in range(4)]

    def post() -> None:
        for token in range(2000):
            boxes[token % 4].post(TokenEvent("r", token=token))

    thread = threading.Thread(target=post)
    thread.start()

    async def read(box: Mailbox) -> list[int | None]:
        found: list[int | None] = []
        while len(found) < 500:
            found += [event.token for event in await asyncio.wait_for(box.take(), 20)]
        return found

    got = await asyncio.gather(*map(read, boxes))
    thread.join()
    assert got == [list(range(i, 2000, 4)) for i in range(4)]


def test_a_bell_of_a_closed_loop_is_silent():
    loop = asyncio.new_event_loop()
    bell = Bell(loop)
    loop.close()
    box = Mailbox(bell)
    box.post(TokenEvent("r", token=1))  # raises nothing: nobody is left to hear it
