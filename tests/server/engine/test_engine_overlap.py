"""What the engine does while a device computes by itself: the order of work, and nobody's loss."""

from collections.abc import Callable

import pytest

from fader_server.core import Plan, RowResult, TokenEvent
from fader_server.engine.blocks import BlockManager
from fader_server.engine.limits import Limits
from fader_server.engine.scheduler import Scheduler
from fader_server.engine.stepper import Stepper
from fader_server.errors import EngineFault
from tests.server.engine.engine_device import Device
from tests.server.engine.engine_world import FakePool, Seen, World, expected, request


class Recorded(Device):
    """A device that waits for its results, and writes down when what happens."""

    def __init__(self, order: list[str]) -> None:
        super().__init__(40, 4)
        self.order = order
        self.fail_launches = 0

    def run(self, plan: Plan) -> list[RowResult]:
        self.order.append(f"run {len(plan.rows)}")
        return super().run(plan)


class RecordedAhead(Recorded):
    """The same, computing by itself."""

    def launch(self, plan: Plan) -> "Step":
        self.order.append(f"launch {len(plan.rows)}")
        if self.fail_launches:
            self.fail_launches -= 1
            raise RuntimeError("injected")
        return Step(self, plan)


class Step:
    def __init__(self, device: RecordedAhead, plan: Plan) -> None:
        self.device, self.plan = device, plan

    ahead = None

    def results(self) -> list[RowResult]:
        self.device.order.append("wait")
        return Device.run(self.device, self.plan)


class Told:
    """An observer in the same order of work."""

    def __init__(self, order: list[str]) -> None:
        self.order = order

    def on_step(self, seconds: float, rows: int, tokens: int) -> None:
        self.order.append("observe")


class Rig:
    def __init__(self, kind: Callable[[list[str]], Recorded] = RecordedAhead) -> None:
        self.order: list[str] = []
        self.seen: dict[str, Seen] = {}
        self.device = kind(self.order)
        limits = Limits(max_rows=4, chunk_size=8, max_step_tokens=12, max_model_len=64)
        blocks = BlockManager(40, block_size=4)
        self.scheduler = Scheduler(limits, blocks=blocks, pool=FakePool(3))
        self.stepper = Stepper(
            self.scheduler,
            self.device,
            self.device.upload,
            deliver=self.take,
            clock=lambda: 0.0,
            observer=Told(self.order),
        )

    def take(self, event: TokenEvent) -> None:
        self.order.append("end" if event.finish or event.error else "token")
        self.seen[event.request_id].take(event)

    def submit(self, *names: str, tokens: int = 3) -> None:
        for name in names:
            one = request(name, range(3), max_tokens=tokens)
            self.seen[name] = Seen(one)
            self.stepper.add(one)

    def finish(self) -> None:
        while self.stepper.turn():
            pass

    def all_right(self) -> bool:
        return all(s.tokens == expected(s.request) for s in self.seen.values())


def test_a_steps_events_are_delivered_while_the_next_one_is_under_way() -> None:
    rig = Rig()
    rig.submit("a")
    rig.finish()
    assert rig.order == [
        *("launch 1", "wait"),
        *("launch 1", "token", "observe", "wait"),
        *("launch 1", "token", "observe", "wait"),
        *("end", "observe"),  # nothing follows to wait for
    ]
    assert rig.all_right()


def test_a_device_that_computes_on_the_callers_thread_never_keeps_events_back() -> None:
    rig = Rig(Recorded)
    rig.submit("a")
    rig.finish()
    assert rig.order == [
        *("run 1", "token", "observe"),
        *("run 1", "token", "observe"),
        *("run 1", "end", "observe"),
    ]


@pytest.mark.parametrize("failures", [1, 2])
def test_a_launch_that_fails_delivers_what_was_kept_and_runs_again_in_parts(failures: int) -> None:
    rig = Rig()
    rig.submit("a", "b")
    rig.stepper.turn()
    rig.device.fail_launches = failures
    rig.finish()
    failed = rig.order.index("launch 2", 1)
    assert rig.order[failed : failed + 6] == [
        "launch 2",
        "token",
        "token",
        "observe",
        *["run 1"] * 2,
    ]
    assert rig.all_right()


def test_a_row_that_fails_when_it_is_waited_for_costs_only_itself() -> None:
    rig = Rig()
    rig.submit("a", "b", "c")
    rig.stepper.turn()
    rig.device.culprits.add("b")
    rig.finish()
    assert isinstance(rig.seen["b"].error, EngineFault)
    del rig.seen["b"]
    assert rig.all_right()
    assert rig.order.count("end") == 3


def test_nothing_of_an_aborted_request_is_delivered_even_to_one_of_its_name() -> None:
    rig = Rig()
    rig.submit("a", "b")
    rig.stepper.turn()
    rig.stepper.abort("a")
    rig.submit("a", tokens=2)  # takes the old one's place: an old event would be one too many
    rig.finish()
    assert rig.all_right()
    assert [s.ends for s in rig.seen.values()] == [1, 1]


def test_what_delivery_raises_is_no_fault_of_a_row() -> None:
    rig = Rig()
    rig.submit("a")
    rig.stepper.turn()
    del rig.seen["a"]
    with pytest.raises(KeyError):
        rig.stepper.turn()
    assert rig.device.runs == 1, "nothing was run again"
    assert rig.stepper.faults == 0


def test_an_abort_between_turns_frees_what_a_later_launch_may_use() -> None:
    world = World(ahead=True, max_rows=2, blocks=9)
    for name in "abcd":
        world.submit(request(name, range(9), max_tokens=6))
    world.turn()
    world.abort("a")
    world.finish()
    assert [len(s.tokens) for n, s in world.seen.items() if n != "a"] == [6, 6, 6]
