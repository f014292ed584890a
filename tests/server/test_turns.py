"""Turns of tenants: one at a time, who was served last goes last, who leaves is passed over."""

import asyncio

import pytest

from fader_server.turns import Turns


class Line:
    """Works that last until they are told to end."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.begun: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}

    async def ask(self, name: str) -> "asyncio.Task[None]":
        self.ends[name] = asyncio.Event()
        task = asyncio.create_task(self._work(name))
        await turn_of_the_loop()
        return task

    async def _work(self, name: str) -> None:
        async with self.turns.one(name[0]):
            self.begun.append(name)
            await self.ends[name].wait()

    async def end(self, name: str) -> None:
        self.ends[name].set()
        await turn_of_the_loop()


async def turn_of_the_loop() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


async def test_tenants_take_turns_and_each_keeps_its_order():
    line = Line()
    tasks = [await line.ask(name) for name in ("a1", "a2", "a3", "b1", "b2", "c1")]
    for name in ("a1", "b1", "c1", "a2", "b2", "a3"):
        assert line.begun[-1] == name
        await line.end(name)
    await asyncio.gather(*tasks)
    assert not line.turns._taken
    assert not line.turns._waiting


async def test_who_leaves_while_waiting_is_passed_over():
    line = Line()
    tasks = {name: await line.ask(name) for name in ("a1", "b1", "b2", "c1")}
    for name in ("b1", "b2"):
        tasks[name].cancel()
    await turn_of_the_loop()
    await line.end("a1")
    assert line.begun == ["a1", "c1"]
    await line.end("c1")
    assert not line.turns._taken


async def test_a_turn_that_is_given_to_who_leaves_in_the_same_moment_goes_on():
    line = Line()
    tasks = {name: await line.ask(name) for name in ("a1", "b1", "c1")}
    line.ends["a1"].set()
    for _ in range(9):  # until the turn is given, and b1 has not run yet
        if "b" not in line.turns._waiting:
            break
        await asyncio.sleep(0)
    tasks["b1"].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks["b1"]
    await turn_of_the_loop()
    assert line.begun == ["a1", "c1"]


async def test_a_work_that_fails_gives_its_turn_back():
    turns = Turns()
    with pytest.raises(ValueError, match="broken"):
        async with turns.one("a"):
            raise ValueError("broken")
    async with asyncio.timeout(1), turns.one("b"):
        pass
