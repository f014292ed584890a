"""How long a request waited for its first step, told once, on its first event."""

from fader_server.core import TokenEvent
from tests.server.engine.engine_world import World, request


def _queued(world: World) -> dict[str, list[float | None]]:
    """What every event of every request will say."""
    told: dict[str, list[float | None]] = {}
    deliver = world.stepper._deliver

    def listen(event: TokenEvent) -> None:
        seconds = None if event.admitted is None else event.admitted.queued
        told.setdefault(event.request_id, []).append(seconds)
        deliver(event)

    world.stepper._deliver = listen
    return told


def test_the_first_event_tells_the_wait_and_no_other_does():
    world = World(max_rows=1)
    told = _queued(world)
    world.submit(request("first", range(5), max_tokens=3))
    world.submit(request("second", range(5, 9), max_tokens=2))
    for _ in range(3):
        world.turn()
        world.now += 1.0
    world.finish()
    assert told == {"first": [0.0, None, None], "second": [3.0, None]}


def test_a_long_prompt_waits_until_its_first_chunk_not_until_its_token():
    world = World(chunk_size=4)
    told = _queued(world)
    world.submit(request("long", range(12), max_tokens=1))
    while world.turn():
        world.now += 1.0
    world.finish()
    assert told == {"long": [0.0]}


def test_a_request_sent_back_keeps_its_first_admission():
    world = World(blocks=6, block_size=4, max_rows=2)
    told = _queued(world)
    world.submit(request("old", range(6), max_tokens=10))
    world.submit(request("new", range(6, 12), max_tokens=10))
    while world.turn():
        world.now += 1.0
    world.finish()
    assert world.scheduler.preemptions
    for times in told.values():
        assert times[0] is not None
        assert set(times[1:]) == {None}


def test_nothing_is_kept_of_requests_that_end_without_a_step():
    world = World(max_rows=1)
    world.submit(request("runs", range(5), max_tokens=2))
    world.submit(request("waits", range(5), max_tokens=2))
    world.turn()
    world.abort("waits")
    world.finish()
    assert not world.stepper._since
    assert not world.stepper._admitted
