"""Swaps seen by readers at the same time: every answer fits one order of all writes and reads."""

import asyncio
import json
import shutil
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from fader_adapters.source import CONFIG_FILE
from fader_server import demo
from tests.server.served_world import Served, served

WRITES = 12
READERS = 6


@dataclass(frozen=True)
class Op:
    """One write of the n-th version, or one read that saw it."""

    began: float
    ended: float
    n: int


def contradictions(writes: list[Op], reads: list[Op]) -> list[Op]:
    """Reads that fit no order: of a version that was not there yet, or that was replaced before.

    Writes are one after another; version 0 was there before all.
    """
    wrong = []
    for read in reads:
        early = read.n > 0 and writes[read.n - 1].began > read.ended
        late = any(write.ended < read.began for write in writes[read.n :])
        if early or late:
            wrong.append(read)
    ordered = sorted(reads, key=lambda read: read.ended)
    for before, after in pairwise(ordered):
        if before.ended < after.began and after.n < before.n:
            wrong.append(after)
    return wrong


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """As many versions of one adapter as there are writes, and one more."""
    for n in range(WRITES + 1):
        folder = tmp_path / "root" / "team" / f"v{n}"
        shutil.copytree(demo.adapter_dirs()["shout"], folder)
        settings = json.loads((folder / CONFIG_FILE).read_text())
        settings["lora_alpha"] += n + 1
        (folder / CONFIG_FILE).write_text(json.dumps(settings))
    return tmp_path / "root"


async def history(server: Served, model: str) -> tuple[list[Op], list[Op]]:
    """Swap through all versions while readers ask; versions are numbered in the order of writes."""
    number = {(await server.put("moving", "team/v0")).json()["version"][:12]: 0}
    seen: list[tuple[float, float, str]] = []
    writes: list[Op] = []
    done = asyncio.Event()

    async def read() -> None:
        while not done.is_set():
            began = time.perf_counter()
            answer = await server.ask(model, max_tokens=2)
            blend = answer.headers["x-fader-blend"]
            seen.append((began, time.perf_counter(), blend.partition("@")[2][:12]))

    async def write() -> None:
        for n in range(1, WRITES + 1):
            before = len(seen)
            began = time.perf_counter()
            answer = await server.put("moving", f"team/v{n}")
            writes.append(Op(began, time.perf_counter(), n))
            number[answer.json()["version"][:12]] = n
            await server.until(lambda before=before: len(seen) >= before + 3)
        done.set()

    await asyncio.gather(write(), *(read() for _ in range(READERS)))
    return writes, [Op(began, ended, number[version]) for began, ended, version in seen]


@pytest.mark.parametrize("model", ["moving", pytest.param("follows", marks=pytest.mark.slow)])
async def test_readers_beside_swaps_see_one_order(root, model):
    async with served(root, max_batch_rows="16") as server:
        await server.put("moving", "team/v0")
        await server.recipe("follows", moving=1.0)
        writes, reads = await history(server, model)
    assert contradictions(writes, reads) == []
    assert len({read.n for read in reads}) > WRITES // 2, "the readers saw too little"


def test_a_history_with_a_stale_or_an_early_read_is_no_order():
    writes = [Op(1, 2, 1), Op(3, 4, 2)]
    good = [Op(0, 0.5, 0), Op(0, 1.5, 1), Op(1.2, 3.5, 0), Op(1.2, 3.5, 2), Op(5, 6, 2)]
    assert contradictions(writes, good) == []
    for bad in (Op(2.5, 2.7, 0), Op(0, 0.5, 1), Op(4.5, 5, 1)):
        assert contradictions(writes, [bad]) == [bad]
    assert contradictions(writes, [Op(3.1, 3.2, 2), Op(3.3, 3.4, 1)])
