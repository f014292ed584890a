import gc
import weakref

import pytest

from fader_adapters.errors import AdapterTooLarge
from fader_server.core import Plan
from fader_server.engine.isolation import is_out_of_memory, run_isolated
from fader_server.errors import EngineFault
from tests.server.engine.engine_device import OutOfMemoryError
from tests.server.engine.engine_world import World, blend_of, expected, request, version


def crowd(world: World, count: int = 6) -> None:
    for i in range(count):
        world.submit(request(f"r{i}", range(i, i + 4), max_tokens=6))


def outcome_of(world: World) -> list[str]:
    return [name for name, seen in world.seen.items() if seen.error is not None]


def roomy() -> World:
    return World(blocks=100, max_rows=8, max_step_tokens=64)


@pytest.mark.parametrize("culprits", [{"r0"}, {"r5"}, {"r2", "r3"}, {"r0", "r1", "r2", "r3", "r4"}])
def test_only_the_rows_at_fault_fail(culprits):
    world = roomy()
    crowd(world)
    world.turn()
    world.device.culprits |= culprits
    world.finish()
    assert set(outcome_of(world)) == culprits
    assert all(isinstance(world.seen[name].error, EngineFault) for name in culprits)
    assert world.seen["r5" if "r5" not in culprits else "r0"].finish == "length"


def test_one_culprit_among_eight_is_found_in_seven_runs():
    world = roomy()
    crowd(world, 8)
    world.device.culprits.add("r7")
    world.turn()
    assert world.device.runs == 7


def test_every_request_of_a_step_may_be_at_fault_without_ending_the_engine():
    world = roomy()
    crowd(world, 2)
    world.device.culprits |= {"r0", "r1"}
    world.finish()
    assert outcome_of(world) == ["r0", "r1"]
    world.submit(request("next", (1,)))
    world.finish()
    assert world.seen["next"].finish == "length"


def test_a_device_that_fails_the_probe_too_is_broken():
    world = roomy()
    crowd(world, 3)
    world.device.broken = True
    with pytest.raises(EngineFault, match="every request"):
        world.turn()


def test_a_row_too_many_for_memory_steps_back_and_finishes_later():
    world = roomy()
    crowd(world, 3)
    world.device.out_of_memory_above = 9
    world.turn()
    assert world.scheduler.preemptions == 1
    assert [s.request.id for s in world.scheduler._roster.waiting] == ["r2"]
    world.finish()
    assert outcome_of(world) == []


def test_a_request_that_never_fits_memory_fails_alone():
    world = roomy()
    crowd(world, 3)
    world.turn()
    big = world.submit(request("big", range(40, 48)))
    world.device.out_of_memory_above = 7
    world.finish()
    assert outcome_of(world) == ["big"]
    assert "memory" in str(big.error)


@pytest.mark.parametrize(
    ("error", "yes"),
    [
        (MemoryError(), True),
        (OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("illegal memory access"), False),
        (AdapterTooLarge("x"), False),
    ],
)
def test_out_of_memory_is_told_from_other_faults(error, yes):
    assert is_out_of_memory(error) == yes


def test_too_few_results_are_a_fault_of_the_step():
    class Short:
        def run(self, plan: Plan):
            return []

    world = roomy()
    crowd(world, 2)
    plan = world.scheduler.plan()
    assert plan is not None
    assert len(run_isolated(Short(), plan).failed) == 2


def test_a_failed_step_keeps_nothing_of_the_device_alive():
    class Tensor:
        pass

    alive: list[weakref.ref] = []

    class Leaky:
        def run(self, plan: Plan):
            scratch = Tensor()
            assert not [ref for ref in alive if ref() is not None], "held during the retry"
            alive.append(weakref.ref(scratch))
            raise RuntimeError("injected")

    world = roomy()
    crowd(world, 4)
    plan = world.scheduler.plan()
    assert plan is not None
    gc.disable()
    try:
        outcome = run_isolated(Leaky(), plan)
    finally:
        gc.enable()
    assert len(alive) == 7
    assert [str(error) for _, error in outcome.failed] == ["injected"] * 4
    assert not [ref for ref in alive if ref() is not None]


def test_a_step_without_a_single_good_row_is_no_progress():
    world = roomy()
    crowd(world, 2)
    world.now = 1.0
    world.turn()
    assert world.stepper.progress_at == 1.0
    world.now = 2.0
    world.device.culprits |= {"r0", "r1"}
    world.turn()
    assert world.stepper.progress_at == 1.0


def test_an_upload_that_fails_costs_its_requests_and_is_tried_again_for_the_next():
    world = roomy()
    bad, good, both = blend_of(("a", 1.0)), blend_of(("b", 1.0)), blend_of(("a", 1.0), ("b", 1.0))
    for name, blend in (("a", bad), ("b", good), ("ab", both), ("base", blend_of())):
        world.submit(request(name, (1, 2), blend=blend))
    world.device.bad_uploads = {version("a")}
    world.finish()
    assert outcome_of(world) == ["a", "ab"]
    assert "could not be brought" in str(world.seen["a"].error)
    world.device.bad_uploads = set()
    again = world.submit(request("a2", (1, 2), blend=bad))
    world.finish()
    assert again.tokens == expected(again.request)
