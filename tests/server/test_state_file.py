"""The file of --state-dir: the old list or the new one, whatever happens while it is written.

A crash is played by an exception out of a system call, and by real processes that are killed.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fader_server import state_file
from fader_server.errors import ConfigInvalid
from fader_server.state_entries import Origin, State, Wanted, WantedRecipe
from fader_server.state_file import StateFile

V1, V2 = "1" * 64, "2" * 64
OLD = State(adapters={"a": Wanted("one", None, V1, pin=True)})
NEW = State(
    adapters={"a": Wanted("team/two", "c0ffee", V2, pin=False), "org/b": None},
    pins=frozenset({"shout"}),
    recipes={"warm": WantedRecipe((("a", 0.7), (f"a@{V1}", -0.5000001)), 7)},
    versions={f"a@{V1}": Origin("one", None)},
)


class Crash(BaseException):
    """The process ended here."""


class Calls:
    """The system calls of one write, each of which may be the last one, or half of one."""

    def __init__(self, patch: pytest.MonkeyPatch, *, last: int = 10**9, part: int = 0) -> None:
        self.made: list[str] = []
        self._last = last
        self._part = part
        for name in ("open", "write", "fsync", "replace", "close"):
            patch.setattr(state_file.os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            if len(self.made) >= self._last:
                if name == "close":  # the system does it for a dead process
                    return call(*arguments, **named)
                if name == "write" and self._part:
                    call(arguments[0], bytes(arguments[1][: self._part]))
                raise Crash(name)
            self.made.append(name)
            return call(*arguments, **named)

        return run


def calls_of(file: StateFile, state: State, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    with monkeypatch.context() as patch:
        calls = Calls(patch)
        file.write(state)
    return calls.made


def crash(file: StateFile, state: State, patch: pytest.MonkeyPatch, **where: int) -> None:
    with patch.context() as patched:
        Calls(patched, **where)
        with pytest.raises(Crash):
            file.write(state)


def test_what_is_written_is_read(tmp_path):
    file = StateFile(tmp_path)
    assert file.read() == State()
    for state in (OLD, NEW, State()):
        file.write(state)
        assert StateFile(tmp_path).read() == state


def test_a_crash_between_any_two_system_calls_leaves_the_old_list_or_the_new(tmp_path, monkeypatch):
    file = StateFile(tmp_path)
    made = calls_of(file, OLD, monkeypatch)
    assert made == ["open", "write", "fsync", "close", "replace", "open", "fsync", "close"]
    found = []
    for last, name in enumerate(made):
        if name == "close":
            continue
        file.write(OLD)
        crash(file, NEW, monkeypatch, last=last)
        found.append(file.read())
        file.write(NEW)  # what was left behind does not stop the next write
        assert file.read() == NEW
    assert found == [OLD] * 4 + [NEW] * 2


def test_a_crash_after_any_byte_leaves_the_old_list(tmp_path, monkeypatch):
    file = StateFile(tmp_path)
    file.write(NEW)
    size = (tmp_path / "adapters.json").stat().st_size
    file.write(OLD)
    for part in range(1, size):
        crash(file, NEW, monkeypatch, last=1, part=part)
        assert (tmp_path / "adapters.new").stat().st_size == part
        assert file.read() == OLD


def test_writing_in_place_would_be_noticed(tmp_path, monkeypatch):
    """The control: the same crashes on the file itself leave neither list."""
    file = StateFile(tmp_path)
    file.write(OLD)
    monkeypatch.setattr(Path, "with_suffix", lambda path, suffix: path)
    crash(file, NEW, monkeypatch, last=1, part=100)
    with pytest.raises(ConfigInvalid, match="damaged"):
        file.read()


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    file, write = StateFile(tmp_path), os.write
    monkeypatch.setattr(state_file.os, "write", lambda fd, data: write(fd, data[:7]))
    file.write(NEW)
    assert file.read() == NEW


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_failing_disk_leaves_the_old_list(tmp_path, monkeypatch, call):
    file = StateFile(tmp_path)
    file.write(OLD)

    def fail(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(state_file.os, call, fail)
        with pytest.raises(OSError, match="No space"):
            file.write(NEW)
    assert file.read() == OLD


@pytest.mark.parametrize("damage", ["", "{}", "[]", "half", "value", "flip", "null"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    file = StateFile(tmp_path)
    file.write(OLD)
    path = tmp_path / "adapters.json"
    whole = path.read_text()
    changes = {
        "half": whole[: len(whole) // 2],
        "value": whole.replace("one", "two"),
        "flip": whole.replace(V1, "3" + V1[1:]),
    }
    path.write_text(changes.get(damage, damage))
    with pytest.raises(ConfigInvalid, match="damaged"):
        file.read()
    path.write_text(whole)
    assert file.read() == OLD


def test_a_list_of_the_first_format_is_read_and_of_a_later_one_refused(tmp_path):
    adapters = {
        "a": {"source": "one", "revision": None, "version": V1, "pin": True},
        "gone": None,
    }
    path = tmp_path / "adapters.json"
    stored = {"format": 1, "sha256": state_file._hash(adapters), "adapters": adapters}
    path.write_text(json.dumps(stored))
    assert StateFile(tmp_path).read() == State(adapters={**OLD.adapters, "gone": None})
    path.write_text(json.dumps({**stored, "sha256": "0" * 64}))
    with pytest.raises(ConfigInvalid, match="damaged"):
        StateFile(tmp_path).read()
    path.write_text(json.dumps({**stored, "format": 3}))
    with pytest.raises(ConfigInvalid, match="format 3"):
        StateFile(tmp_path).read()


BAD = [
    ("adapters", "../x", None),
    ("adapters", "b", {"source": "one"}),
    ("adapters", "b", {"source": 1, "revision": None, "version": V1, "pin": True}),
    ("adapters", "b", {"source": "one", "revision": None, "version": "abc", "pin": True}),
    ("adapters", "b", {"source": "one", "revision": None, "version": V1, "pin": "yes"}),
    ("adapters", "b", []),
    ("pins", "b", 1),
    ("recipes", "b", {"adapters": [], "created": 1}),
    ("recipes", "b/c", {"adapters": [{"name": "a", "weight": 1}], "created": 1}),
    ("recipes", "b", {"adapters": [{"name": "a", "weight": 17}], "created": 1}),
    ("recipes", "b", {"adapters": [{"name": "a", "weight": "1"}], "created": 1}),
    ("recipes", "b", {"adapters": [{"name": "a@12", "weight": 1}], "created": 1}),
    ("recipes", "b", {"adapters": [{"weight": 1}], "created": 1}),
    ("versions", "a@12", {"source": "one", "revision": None}),
    ("versions", f"a@{V2}", {"source": None, "revision": None}),
]


@pytest.mark.parametrize(("section", "name", "entry"), BAD)
def test_a_bad_entry_is_told_skipped_and_not_lost(tmp_path, caplog, section, name, entry):
    file = StateFile(tmp_path)
    file.write(NEW)
    path = tmp_path / "adapters.json"
    content = state_file._content(json.loads(path.read_text()))
    content[section][name] = entry
    stored = {"format": 2, "sha256": state_file._hash(content), **content}
    path.write_text(json.dumps(stored))
    found = file.read()
    assert [record.fields for record in caplog.records] == [{"section": section, "entry": name}]
    known = {part: getattr(found, part) for part in ("adapters", "pins", "recipes", "versions")}
    assert known == {part: getattr(NEW, part) for part in known}
    file.write(found)
    assert json.loads(path.read_text())[section][name] == entry


def test_one_server_at_a_time_uses_a_directory(tmp_path):
    with StateFile(tmp_path).locked():
        with pytest.raises(ConfigInvalid, match="another server"), StateFile(tmp_path).locked():
            pass
        with StateFile(tmp_path / "other").locked():
            pass
    with StateFile(tmp_path).locked(), pytest.raises(BlockingIOError):
        raise BlockingIOError  # one of the body's own is not taken for the lock's


WRITER = """
import sys
from pathlib import Path
from fader_server.state_entries import State, Wanted
from fader_server.state_file import StateFile
file = StateFile(Path(sys.argv[1]))
n = int(file.read().adapters["a0"].version)
while True:
    n += 1
    wanted = Wanted("s", None, f"{n:064d}", False)
    file.write(State(adapters={f"a{k}": wanted for k in range(20)}))
    sys.stdout.write(f"{n}\\n")
    sys.stdout.flush()
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_list_that_is_not_older_than_what_was_told(tmp_path):
    """Two hundred lives of one process after another, each killed in the middle of its writes."""
    file = StateFile(tmp_path)
    file.write(State(adapters={f"a{k}": Wanted("s", None, "0" * 64, False) for k in range(20)}))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    moved = 0
    for life in range(200):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert process.stdout is not None
        first = int(process.stdout.readline())
        for _ in range(life % 7):
            process.stdout.readline()
        for _ in range(life * 997 % 20_000):  # some moment of the write after that
            pass
        process.send_signal(signal.SIGKILL)
        told = [int(line) for line in process.stdout.read().split(b"\n")[:-1]]
        process.wait()
        process.stdout.close()
        versions = {wanted and wanted.version for wanted in file.read().adapters.values()}
        assert len(versions) == 1
        (version,) = versions
        assert int(version or 0) >= max([first, *told])
        moved += int(version or 0) > first
    assert moved > 100, "the kills never came between two writes"
