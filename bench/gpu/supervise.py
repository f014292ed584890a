"""Runs sections in processes of their own, so that a crash, a hang or a lost device costs one
section and the whole ends in time. Knows processes and clocks; measures nothing."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu.section import Outcome, Section

GRACE = 15.0
"""Seconds beyond its budget after which a section's process is ended."""
START_SECONDS = 60.0
"""What a process may take to begin its first section: imports, the driver."""
REPLACE_SECONDS = 20.0
"""With less time than this left no process is started any more."""
POLL = 0.1
DUMP_SECONDS = 0.5
"""What a hanging process gets to say where it is."""

Command = Callable[[Sequence[str], Path, float], list[str]]
"""(names, told, until) → the process that runs these sections and tells of them in `told`."""


@dataclass
class Supervisor:
    """Runs sections by `command`, each within budget × slack, all of them before `end`.

    end    time.monotonic() when everything has ended, killed where need be
    note   called with what is known so far whenever a section has ended
    """

    sections: Sequence[Section]
    command: Command
    end: float
    slack: float = 1.0
    note: Callable[[list[Outcome]], None] = lambda outcomes: None
    _done: dict[str, Outcome] = field(default_factory=dict)

    def run(self) -> list[Outcome]:
        """Outcomes in order."""
        while left := self._left():
            if self.end - time.monotonic() < min(REPLACE_SECONDS, left[0].seconds):
                for section in left:
                    late = Outcome(section.name, "out of time", 0.0, "the suite's time is spent")
                    self._done[section.name] = late
                break
            with tempfile.TemporaryDirectory() as folder:
                self._process([section.name for section in left], Path(folder))
        self.note(self._outcomes())
        return self._outcomes()

    def _left(self) -> list[Section]:
        """Sections still to run; those that need one that was killed never will."""
        for section in self.sections:
            needed = self._done.get(section.needs)
            if section.name not in self._done and needed and needed.state == "killed":
                told = f"{section.needs!r}, over the same model, was killed"
                self._done[section.name] = Outcome(section.name, "unavailable", 0.0, told)
        return [section for section in self.sections if section.name not in self._done]

    def _outcomes(self) -> list[Outcome]:
        return [self._done[s.name] for s in self.sections if s.name in self._done]

    def _process(self, names: Sequence[str], folder: Path) -> None:
        """One process until it ends, overstays or loses its device."""
        told, said = folder / "told", folder / "said"
        told.touch()
        with said.open("wb") as errors:
            process = subprocess.Popen(
                self.command(names, told, self.end), stderr=errors, start_new_session=True
            )
        reader = _Relay(said)
        try:
            current, since, late = self._follow(process, told, reader)
        finally:
            _end(process)
        reader.copy()
        self._take(told)
        if not current and not late and not any(name in self._done for name in names):
            current = names[0]
        if current and current not in self._done:
            why = "its process was ended" if late else f"its process died ({process.returncode})"
            state = "out of time" if late and time.monotonic() >= self.end else "killed"
            seconds = round(time.monotonic() - since, 1)
            self._done[current] = Outcome(current, state, seconds, f"{why}; {reader.last}")
            self.note(self._outcomes())

    def _follow(
        self, process: "subprocess.Popen[bytes]", told: Path, reader: "_Relay"
    ) -> tuple[str, float, bool]:
        """(the section under way, when it began, whether it overstayed)"""
        budget = {section.name: section.seconds for section in self.sections}
        current, since = "", time.monotonic()
        while True:
            running = process.poll() is None
            latest = self._take(told)
            reader.copy()
            if latest != current:
                current, since = latest, time.monotonic()
            allowed = budget.get(current, START_SECONDS) * self.slack + GRACE
            now = time.monotonic()
            if not running:
                return current, since, False
            if now - since > allowed or now > self.end:
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGUSR1)
                    time.sleep(DUMP_SECONDS)
                return current, since, True
            time.sleep(POLL)

    def _take(self, told: Path) -> str:
        """Take in what ended since; the section under way."""
        entries = _entries(told)
        begun = [entry["begin"] for entry in entries if "begin" in entry]
        ended = [Outcome(**entry["end"]) for entry in entries if "end" in entry]
        fresh = [outcome for outcome in ended if outcome.name not in self._done]
        self._done |= {outcome.name: outcome for outcome in fresh}
        if fresh:
            self.note(self._outcomes())
        return begun[-1] if len(begun) > len(ended) else ""


class _Relay:
    """Passes on what a process says on its stderr, and keeps its last words."""

    def __init__(self, said: Path) -> None:
        self._said = said
        self._at = 0
        self._tail = ""

    def copy(self) -> None:
        with self._said.open("rb") as file:
            file.seek(self._at)
            fresh = file.read()
        self._at += len(fresh)
        text = fresh.decode(errors="replace")
        self._tail = (self._tail + text)[-8000:]
        sys.stderr.write(text)

    @property
    def last(self) -> str:
        """Where it hung, or its last line."""
        lines = [line.strip() for line in self._tail.splitlines() if line.strip()]
        dumps = [i for i, line in enumerate(lines) if "most recent call first" in line]
        if dumps:
            return "in " + " < ".join(lines[dumps[-1] + 1 : dumps[-1] + 4])[:300]
        return lines[-1][:300] if lines else "it said nothing"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The process and what it started, which is in its session, in whatever groups."""
    for pid in _session(process.pid):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # one that hangs in the driver is left behind
        process.wait(5)


def _session(leader: int) -> list[int]:
    """Processes of the session that `leader` began, itself among them while it is there."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader:
                found.append(int(folder.name))
    return found


def _entries(told: Path) -> list[dict[str, Any]]:
    """Whole lines only: the last may still be written."""
    text = told.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
