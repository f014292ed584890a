"""Adapters on their way: nobody reads them before they arrive, nobody waits who need not."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from fader_adapters.kernels.tables import Tables
from fader_adapters.pool import Pool
from fader_adapters.transfers import CopyNow, SideStream, Ticket, transfers_to
from tests.adapters.peft_files import BASE
from tests.adapters.test_pool import UNIT, Data, make


class Slow:
    """A copy that ends when the test says so, or when somebody needs it to have ended."""

    def __init__(self, end: Callable[[], object]) -> None:
        self._end = end
        self.ended = self.joined = self.waited = False

    def finish(self) -> None:
        if not self.ended:
            self._end()
            self.ended = True

    def done(self) -> bool:
        return self.ended

    def join(self) -> None:
        self.joined = True
        self.finish()

    def wait(self) -> None:
        self.waited = True
        self.finish()


class SlowTransfers:
    """Copies that end in any order."""

    def __init__(self) -> None:
        self.tickets: list[Slow] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Ticket:
        self.tickets.append(Slow(partial(target.copy_, source)))
        return self.tickets[-1]


class World:
    def __init__(self, room: int) -> None:
        self.tables = Tables(torch.full((room * UNIT,), math.nan), len(BASE.linears))
        self.transfers = SlowTransfers()
        self.pool = Pool(self.tables, transfers=self.transfers)

    def take(self, *data: Data) -> None:
        uploads = self.pool.acquire({d.spec.version: d for d in data})
        assert uploads is not None
        self.pool.upload(uploads)

    def let_go(self, *data: Data) -> None:
        self.pool.release(tuple(d.spec.version for d in data))

    def lies(self, data: Data) -> bool:
        """Whether the arena holds the version where its slot says."""
        offset = int(self.tables.a_offset[self.pool.slot(data.spec.version), 0])
        return torch.equal(self.tables.arena[offset : offset + data.spec.numel], data.flat)


A, B, C = (make(n) for n in range(1, 4))


def slots(world: World, *data: Data) -> set[int]:
    return {world.pool.slot(d.spec.version) for d in data}


def test_slots_are_late_until_their_own_copy_has_ended_in_any_order():
    world = World(3)
    world.take(A, B)
    world.take(C)
    first, second, third = world.transfers.tickets
    assert set(world.pool.late()) == slots(world, A, B, C)
    third.finish()
    assert set(world.pool.late()) == slots(world, A, B)
    assert world.lies(C)
    assert not world.lies(A)
    first.finish()
    second.finish()
    assert not world.pool.late()
    assert world.lies(A)
    assert world.lies(B)


def test_asking_who_is_late_waits_for_nobody():
    world = World(3)
    world.take(A)
    assert set(world.pool.late()) == slots(world, A)
    (ticket,) = world.transfers.tickets
    assert [ticket.joined, ticket.waited, ticket.ended] == [False] * 3


def test_join_lets_the_stream_wait_for_every_copy_under_way():
    world = World(3)
    world.take(A)
    world.transfers.tickets[0].finish()
    world.pool.late()
    world.take(B)
    world.pool.join()
    assert [ticket.joined for ticket in world.transfers.tickets] == [False, True]
    assert world.lies(B)


@pytest.mark.parametrize("forgotten", [True, False])
def test_a_version_that_leaves_under_way_is_waited_for(forgotten: bool):
    """Its host memory is given away afterwards, and its extent to the next."""
    world = World(1)
    world.take(A)
    world.let_go(A)
    if forgotten:
        world.pool.forget(A.spec.version)
    else:
        world.take(B)  # evicts it
    assert world.transfers.tickets[0].waited
    if not forgotten:
        assert set(world.pool.late()) == slots(world, B)
        world.transfers.tickets[1].finish()
        assert world.lies(B)


def test_an_upload_that_is_repeated_is_copied_once():
    world = World(3)
    uploads = world.pool.acquire({A.spec.version: A})
    assert uploads is not None
    world.pool.upload(uploads)
    world.pool.upload(uploads)
    assert len(world.transfers.tickets) == 1


def test_a_copy_that_fails_publishes_nothing_and_may_be_tried_again():
    class Failing(SlowTransfers):
        def copy(self, target: torch.Tensor, source: torch.Tensor) -> Ticket:
            if not self.tickets:
                super().copy(target, source)
                raise RuntimeError("injected")
            return super().copy(target, source)

    world = World(3)
    world.pool._transfers = Failing()
    uploads = world.pool.acquire({A.spec.version: A})
    assert uploads is not None
    with pytest.raises(RuntimeError, match="injected"):
        world.pool.upload(uploads)
    assert not world.pool.late()
    assert not world.tables.slots
    world.pool.upload(uploads)
    assert set(world.pool.late()) == slots(world, A)


def test_on_the_cpu_copies_have_ended_when_they_were_begun():
    transfers = transfers_to(torch.device("cpu"))
    assert isinstance(transfers, CopyNow)
    target = torch.full((4,), math.nan)
    ticket = transfers.copy(target, torch.ones(4))
    ticket.join()
    ticket.wait()
    assert ticket.done()
    assert target.tolist() == [1, 1, 1, 1]


class Streams:
    """torch.cuda's streams, as far as the transfers use them, telling what was asked of them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.told: list[str] = []
        self.inside = ""
        patch.setattr(torch.cuda, "Stream", lambda device: Stream(self, "side"))
        patch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(self, "engine"))
        patch.setattr(torch.cuda, "stream", self.enter)

    def enter(self, stream: "Stream") -> "Stream":
        self.inside = stream.name
        return stream


class Stream:
    def __init__(self, owner: Streams, name: str) -> None:
        self.owner, self.name = owner, name

    def wait_stream(self, other: "Stream") -> None:
        self.owner.told.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: "Stream") -> None:
        self.owner.told.append(f"{self.name} waits for the copy")

    def record_event(self) -> "Stream":
        self.owner.told.append(f"event on {self.owner.inside}")
        return self

    def query(self) -> bool:
        return False

    def __enter__(self) -> None:
        self.owner.told.append(f"begin {self.name}")

    def __exit__(self, *exception: object) -> None:
        self.owner.told.append(f"end {self.name}")


def test_a_side_stream_starts_after_queued_kernels_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
):
    streams = Streams(monkeypatch)
    transfers = SideStream(torch.device("cuda"))
    ticket = transfers.copy(torch.zeros(2), torch.ones(2))
    assert streams.told == ["side waits for engine", "begin side", "event on side", "end side"]
    assert not ticket.done()
    ticket.join()
    assert streams.told[-1] == "engine waits for the copy"
