"""Runs sections in processes of their own, so that a lost device or a hang costs one section."""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.section import Outcome, Section

GRACE = 30.0
"""Seconds beyond its budget after which a section's process is ended."""
POLL = 0.1


def supervise(
    sections: Sequence[Section],
    command: Callable[[Sequence[str], Path], list[str]],
    *,
    seconds: float,
) -> list[Outcome]:
    """Outcomes in order. `command(names, told)`: the process that runs these sections.

    A process that dies, hangs or loses its device is followed by one with the sections left; after
    `seconds` in all, what is left is not begun.
    """
    budget = {section.name: section.seconds for section in sections}
    done: dict[str, Outcome] = {}
    end = time.monotonic() + seconds
    while left := [name for name in budget if name not in done]:
        if time.monotonic() > end:
            for name in left:
                done[name] = Outcome(name, "out of time", 0.0, "the suite's time is spent")
            break
        with tempfile.TemporaryDirectory() as folder:
            told = Path(folder) / "told"
            told.touch()
            process = subprocess.Popen(command(left, told))
            try:
                current, ended = _follow(process, told, budget, end)
            finally:
                process.kill()
                process.wait()
            done |= {outcome.name: outcome for outcome in ended}
            if not ended and not current:
                current = left[0]
            if current and current not in done:
                why = "its process was ended" if process.returncode < 0 else "its process died"
                done[current] = Outcome(current, "killed", 0.0, f"{why} ({process.returncode})")
    return [done[section.name] for section in sections]


def _follow(
    process: "subprocess.Popen[bytes]", told: Path, budget: dict[str, float], end: float
) -> tuple[str, list[Outcome]]:
    """Until the process ends or a section overstays: the section under way, and the ended."""
    current, since = "", time.monotonic()
    while True:
        running = process.poll() is None
        entries = _entries(told)
        begun = [entry["begin"] for entry in entries if "begin" in entry]
        ended = [Outcome(**entry["end"]) for entry in entries if "end" in entry]
        latest = begun[-1] if len(begun) > len(ended) else ""
        if latest != current:
            current, since = latest, time.monotonic()
        allowed = budget.get(current, 60.0) + GRACE
        if not running or time.monotonic() - since > allowed or time.monotonic() > end + GRACE:
            return current, ended
        time.sleep(POLL)


def _entries(told: Path) -> list[dict[str, Any]]:
    """Whole lines only: the last may still be written."""
    text = told.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
