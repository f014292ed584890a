"""A device without memory costs the newest request at most; a lost device ends the engine."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fader_server.core import Request, TokenEvent
from fader_server.engine.isolation import is_device_lost, is_out_of_memory
from fader_server.engine.stats import Unobserved
from fader_server.engine.stepper import Stepper
from fader_server.errors import EngineFault
from tests.support.families import write_family
from tests.support.world import TinyWorld, greedy


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family("llama", tmp_path_factory.mktemp("base"))


class Rig:
    """A tiny engine whose forward the test may spoil."""

    def __init__(self, source: Path, spoil: Callable[[int], None]) -> None:
        self.world = TinyWorld(source, backend="reference")
        self.events: dict[str, list[TokenEvent]] = {}
        self.runs = 0
        forward = self.world.base.model.forward

        def spoiled(*, input_ids: torch.Tensor, **given: object) -> object:
            self.runs += 1
            spoil(input_ids.shape[1])
            return forward(input_ids=input_ids, **given)

        self.world.base.model.forward = spoiled
        self.stepper = Stepper(
            self.world.scheduler,
            self.world.runner,
            self.world.pool.upload,
            deliver=lambda event: self.events[event.request_id].append(event),
            clock=lambda: 0.0,
            observer=Unobserved(),
            copies=self.world.pool,
        )

    def submit(self, name: str, length: int) -> None:
        self.events[name] = []
        self.stepper.add(Request(name, tuple(range(3, 3 + length)), greedy(4)))

    def finish(self) -> None:
        while self.stepper.turn():
            pass
        assert self.world.blocks.used == 0

    def tokens(self, name: str) -> list[int]:
        return [e.token for e in self.events[name] if e.token is not None]

    def failed(self) -> set[str]:
        return {name for name, events in self.events.items() if events[-1].error is not None}


def fill(rig: Rig) -> Rig:
    for i, length in enumerate((9, 12, 15)):
        rig.submit(f"r{i}", length)
    rig.finish()
    return rig


@pytest.fixture(scope="module")
def undisturbed(source: Path) -> Rig:
    return fill(Rig(source, lambda tokens: None))


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")


def test_the_newest_request_steps_back_and_every_answer_stays(source: Path, undisturbed: Rig):
    def spoil(tokens: int) -> None:
        if tokens > 21:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    rig = fill(Rig(source, spoil))
    assert rig.failed() == set()
    assert rig.world.scheduler.preemptions >= 1
    for name in rig.events:
        assert rig.tokens(name) == undisturbed.tokens(name)


def test_a_request_that_never_fits_fails_alone(source: Path, undisturbed: Rig):
    def spoil(tokens: int) -> None:
        if tokens > 14:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    rig = fill(Rig(source, spoil))
    assert rig.failed() == {"r2"}
    assert "memory" in str(rig.events["r2"][-1].error)
    for name in ("r0", "r1"):
        assert rig.tokens(name) == undisturbed.tokens(name)


def test_an_error_that_sticks_to_the_device_ends_the_engine_without_more_tries(source: Path):
    def spoil(tokens: int) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    rig = Rig(source, spoil)
    with pytest.raises(EngineFault, match="lost"):
        fill(rig)
    assert rig.runs == 1


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: unspecified launch failure"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (torch.OutOfMemoryError("CUDA out of memory."), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: invalid argument"), False),
        (
            torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing"),
            False,
        ),
        (
            RuntimeError("CUDA error: operation failed due to a previous error during capture"),
            False,
        ),
        (RuntimeError("CUDA error: capturing stream has unjoined work"), False),
        (
            RuntimeError("CUDA error: dependency created on uncaptured work in another stream"),
            False,
        ),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
        (ValueError("CUDA error: not raised by a library"), False),
    ],
)
def test_errors_that_stick_are_told_from_those_of_one_call(error: Exception, lost: bool):
    assert is_device_lost(error) is lost


@pytest.mark.parametrize(
    "told", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"]
)
def test_libraries_ways_to_say_out_of_memory_are_known(told: str):
    assert is_out_of_memory(RuntimeError(told))
