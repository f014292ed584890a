"""What a running server does beside serving: its tenants are read again, and nothing waits."""

import asyncio
import logging
import threading

import pytest

from fader_server.errors import ConfigInvalid
from fader_server.launch import Rereading
from fader_server.tenants import Tenant


class File:
    """Each read waits for its gate; what it gives is decided then."""

    def __init__(self) -> None:
        self.gates: list[threading.Event] = []
        self.begun = threading.Semaphore(0)
        self.given: list[str | None] = []

    def __call__(self) -> tuple[Tenant, ...]:
        gate, number = threading.Event(), len(self.gates)
        self.gates.append(gate)
        self.begun.release()
        assert gate.wait(5)
        name = self.given[number]
        if name is None:
            raise ConfigInvalid("a mistake")
        return (Tenant(name, ()),)


@pytest.fixture
def file():
    found = File()
    yield found
    for gate in found.gates:
        gate.set()


async def asked(rereading: Rereading, file: File, *given: str | None) -> None:
    for one in given:
        file.given.append(one)
        rereading.again()
        assert await asyncio.to_thread(file.begun.acquire, timeout=5)


async def settled(rereading: Rereading) -> None:
    await asyncio.wait_for(asyncio.gather(*rereading._tasks), 5)


async def test_the_event_loop_goes_on_while_a_disk_is_silent(file):
    followed: list[tuple[Tenant, ...]] = []
    rereading = Rereading(file, followed.append)
    await asked(rereading, file, "a")
    await asyncio.sleep(0.01)
    assert followed == []
    file.gates[0].set()
    await settled(rereading)
    assert [tenant.name for (tenant,) in followed] == ["a"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(("first", "last"), [("a", "b"), (None, "b"), ("a", None)])
async def test_the_last_signal_wins_in_whatever_order_disks_answer(
    file, caplog, order, first, last
):
    followed: list[tuple[Tenant, ...]] = []
    rereading = Rereading(file, followed.append)
    await asked(rereading, file, first, last)
    for number in order:
        file.gates[number].set()
        await asyncio.sleep(0.02)
    await settled(rereading)
    assert [tenant.name for (tenant,) in followed] == ([last] if last else [])
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == (last is None)


async def test_a_mistake_changes_nothing_and_the_next_signal_is_heard(file, caplog):
    followed: list[tuple[Tenant, ...]] = []
    rereading = Rereading(file, followed.append)
    for number, one in enumerate((None, "b")):
        await asked(rereading, file, one)
        file.gates[number].set()
        await settled(rereading)
    assert [tenant.name for (tenant,) in followed] == ["b"]
    assert "tenants stay as they are" in caplog.text
