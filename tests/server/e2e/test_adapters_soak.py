"""Hours of administration in seconds: nothing grows, nothing stale answers, swaps are atomic."""

import json
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest

from fader_adapters.source import CONFIG_FILE
from fader_server import demo
from tests.server.e2e.conftest import Running, start

pytestmark = pytest.mark.slow

PROMPT = "The colour of the sky is a thing that many have asked about, and the answer was always "
VERSIONS = 40


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("soak")
    for name in ("shout", "german"):
        shutil.copytree(demo.adapter_dirs()[name], root / name)
    for number in range(VERSIONS):  # versions of their own, told apart by their scale
        folder = root / "nested" / f"v{number}"  # not loaded by themselves
        shutil.copytree(demo.adapter_dirs()["shout"], folder)
        fields = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(fields | {"lora_alpha": 4 + number / 10}))
    with start(root) as running:
        yield running
        assert running.metric("fader_adapter_leases") == 0
        assert running.terminate() == 0


def put(client: httpx.Client, name: str, source: str) -> dict:
    answer = client.put(f"/v1/adapters/{name}", json={"source": source})
    assert answer.status_code in (200, 201), answer.text
    return answer.json()


def ask(client: httpx.Client, model: str, **fields: object) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0} | fields
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer


def descriptors(server: Running) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def resident(server: Running) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def test_five_hundred_loads_and_unloads_leave_memory_and_descriptors_flat(server):
    memory, files = [], []
    with httpx.Client(base_url=server.url, timeout=60) as client:
        held = server.metric("fader_adapter_bytes")
        for cycle in range(500):
            name = f"cycle-{cycle}"
            put(client, name, f"nested/v{cycle % VERSIONS}")
            if cycle % 10 == 0:
                ask(client, name, max_tokens=2)
            assert client.delete(f"/v1/adapters/{name}").status_code == 200
            assert cycle % 50 or client.get(f"/v1/adapters/{name}").status_code == 404
            if cycle % 50 == 49:
                memory.append(resident(server))
                files.append(descriptors(server))
        until = time.monotonic() + 5  # the engine gives memory back between two steps
        while server.metric("fader_adapter_bytes") > held and time.monotonic() < until:
            time.sleep(0.02)
        assert server.metric("fader_adapter_bytes") == held
        few = files[-1]
        while descriptors(server) > few and time.monotonic() < until:
            time.sleep(0.02)  # the last scrape's connection closes
        with httpx.Client(base_url=server.url) as other:
            other.get("/health")
            assert descriptors(server) > few, "the meter sees one more connection"
    assert max(files[1:]) - min(files[1:]) <= 1, files
    assert memory[-1] - memory[1] < 8 << 20, memory


def test_a_name_that_comes_back_never_answers_from_anothers_blocks(server):
    def told(model: str, **fields: object) -> tuple[str, int]:
        body = ask(client, model, **fields).json()
        cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
        return body["choices"][0]["text"], cached

    with httpx.Client(base_url=server.url, timeout=60) as client:
        alone = {}
        for source in ("shout", "german"):
            put(client, f"alone-{source}", source)
            alone[source], cached = told(f"alone-{source}", cache_salt="alone")
            assert cached == 0
        assert alone["shout"] != alone["german"]
        first = put(client, "turns", "shout")["version"]
        assert told("turns") == (alone["shout"], 0)
        text, cached = told("turns")
        assert text == alone["shout"]
        assert cached > 0, "the control: blocks are found again while the version is the same"
        put(client, "turns", "german")
        assert told("turns") == (alone["german"], 0)
        assert put(client, "turns", "shout")["version"] == first
        assert told("turns")[0] == alone["shout"]  # its own blocks may be found again
        folder = server.root / "turning"
        shutil.copytree(server.root / "german", folder)
        for source, expected in (("german", "german"), ("shout", "shout")):
            for file in (server.root / source).iterdir():
                shutil.copy(file, folder / file.name)
            put(client, "same-folder", "turning")
            assert told("same-folder", cache_salt="folder") == (alone[expected], 0)
        for name in ("alone-shout", "alone-german", "turns", "same-folder"):
            assert client.delete(f"/v1/adapters/{name}").status_code == 200


@dataclass(frozen=True)
class Operation:
    """A read or a write of the register, seconds on one clock."""

    start: float
    end: float
    version: str


def violations(writes: Sequence[Operation], reads: Sequence[Operation]) -> list[str]:
    """What one writer and many readers of a single atomic register cannot have seen.

    Writes are in order and of different values, so a read is explained by exactly one of them.
    """
    place = {write.version: i for i, write in enumerate(writes)}
    found = []
    newest = -1
    ended: list[tuple[float, int]] = []
    for read in sorted(reads, key=lambda one: one.start):
        at = place.get(read.version)
        if at is None:
            found.append("a value that nobody wrote")
            continue
        if writes[at].start > read.end:
            found.append("read before it was written")
        if at + 1 < len(writes) and writes[at + 1].end < read.start:
            found.append("stale: a later write had been answered")
        newest = max([i for end, i in ended if end < read.start], default=-1)
        if at < newest:
            found.append("went back behind an earlier read")
        ended.append((read.end, at))
    return found


def test_swaps_are_linearizable_under_concurrent_readers(server):
    writes: list[Operation] = []
    reads: list[Operation] = []
    over = threading.Event()

    def read(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not over.is_set():
                began = time.monotonic()
                if number % 2:
                    version = client.get("/v1/adapters/register").json()["version"]
                else:
                    answer = ask(client, "register", prompt=f"{began}", max_tokens=1)
                    version = answer.headers["x-fader-blend"]
                reads.append(Operation(began, time.monotonic(), version))

    with httpx.Client(base_url=server.url, timeout=60) as client:

        def write(number: int) -> None:
            began = time.monotonic()
            version = put(client, "register", f"nested/v{number}")["version"]
            writes.append(Operation(began, time.monotonic(), version))

        write(0)
        readers = [threading.Thread(target=read, args=(number,)) for number in range(4)]
        for reader in readers:
            reader.start()
        for number in range(1, VERSIONS):
            write(number)
            time.sleep(0.02)
        over.set()
        for reader in readers:
            reader.join()
        assert client.delete("/v1/adapters/register").status_code == 200
    short = {write.version[:12]: write.version for write in writes}
    whole = [
        replace(one, version=next(v for s, v in short.items() if s in one.version)) for one in reads
    ]
    assert len({one.version for one in whole}) > VERSIONS / 2
    assert violations(writes, whole) == []
    _control(writes, whole)


def _control(writes: list[Operation], reads: list[Operation]) -> None:
    """The check sees a stale read, one from the future, and one that goes back."""
    last = max(reads, key=lambda one: one.start)
    assert violations(writes, [*reads, replace(last, version=writes[0].version)])
    early = min(reads, key=lambda one: one.end)
    assert violations(writes, [*reads, replace(early, version=writes[-1].version)])
    assert violations(writes, [*reads, replace(last, version="0" * 64)])
    overlapping = [Operation(0, 1, "a"), Operation(2, 9, "b")]
    back = [Operation(3, 4, "b"), Operation(5, 6, "a")]
    assert violations(overlapping, back) == ["went back behind an earlier read"]
    assert violations(overlapping, back[::-1][:1]) == []
