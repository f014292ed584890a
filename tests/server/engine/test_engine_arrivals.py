"""Rows whose adapter is under way sit steps out; streams that run never wait for one."""

from collections.abc import Collection

from fader_server.core import Plan
from tests.server.engine.engine_world import World, blend_of, expected, request


class Copies:
    """Slots that are late until the test lets them arrive."""

    def __init__(self) -> None:
        self.slots: set[int] = set()
        self.joins = 0

    def late(self) -> Collection[int]:
        return self.slots

    def join(self) -> None:
        self.joins += 1
        self.slots = set()


def world_with(copies: Copies) -> World:
    world = World(blocks=100, max_rows=8, max_step_tokens=64)
    world.stepper._copies = copies
    return world


def names(plan: Plan) -> set[str]:
    return {row.sequence.request.id for row in plan.rows}


def test_a_running_stream_goes_on_while_an_adapter_is_on_its_way():
    copies = Copies()
    world = world_with(copies)
    world.submit(request("base", (1, 2), max_tokens=20))
    world.turn()
    copies.slots = {0}
    late = world.submit(request("late", (3, 4, 5), blend=blend_of(("a", 1.0)), max_tokens=4))
    for _ in range(3):
        world.turn()
    assert [names(plan) for plan in world.device.plans] == [{"base"}] * 4
    assert not late.tokens
    copies.slots = set()
    world.turn()
    assert names(world.device.plans[-1]) == {"base", "late"}
    world.finish()
    assert late.tokens == expected(late.request)
    assert copies.joins == 0


def test_where_every_row_would_wait_the_device_does():
    copies = Copies()
    copies.slots = {0}
    world = world_with(copies)
    late = world.submit(request("late", (3, 4, 5), blend=blend_of(("a", 1.0))))
    world.turn()
    assert copies.joins == 1
    assert late.tokens
    world.finish()


def test_only_rows_of_late_slots_sit_out():
    copies = Copies()
    world = world_with(copies)
    copies.slots = {1}
    blends = {
        "a": blend_of(("a", 1.0)),
        "b": blend_of(("b", 1.0)),
        "ab": blend_of(("a", 1.0), ("b", 1.0)),
    }
    for name, blend in blends.items():
        world.submit(request(name, (1, 2), blend=blend))
    world.turn()
    assert names(world.device.plans[-1]) == {"a"}
    copies.slots = set()
    world.finish()
