"""Sections of the suite: what one is, how it ends, how many run in a process. Measures nothing."""

import faulthandler
import importlib
import json
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

State = Literal["ok", "failed", "unavailable", "out of time", "killed"]
SLACK_OFF_GPU = 20.0


class Unavailable(Exception):
    """The section cannot run here; the message says why."""


class ParityFailed(Exception):
    """Numbers were wrong, so no figure is told."""


class BitsDiffer(ParityFailed):
    """Numbers were right, but a row's bits changed with its company: a fault, of which figures of
    speed may be told all the same."""


class OutOfTime(Exception):
    """The section's budget is spent."""


@dataclass
class Rig:
    """Where sections run and how large: the 8B shape on a GPU, or tiny ones anywhere."""

    device: torch.device
    dtype: torch.dtype
    small: bool
    deadline: float = float("inf")
    """time.monotonic() at which the section should end."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What sections of one process share: a model, a measured bandwidth."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def slack(self) -> float:
        """What budgets are multiplied by: Triton's interpreter takes its time."""
        return 1.0 if self.on_gpu else SLACK_OFF_GPU

    @property
    def left(self) -> float:
        """Seconds until the section should end, at least one: for a program that it starts."""
        return max(1.0, self.deadline - time.monotonic())

    @property
    def tight(self) -> bool:
        """fp32 in Triton's interpreter: nothing but the order of sums differs."""
        return self.dtype == torch.float32

    def check_time(self) -> None:
        """Raises OutOfTime; called between measurements, what was measured before stays."""
        if time.monotonic() > self.deadline:
            raise OutOfTime


@dataclass
class Result:
    """What a section found; filled as it goes, so that a late failure costs nothing."""

    figures: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    """For the table, a few words each."""

    def add(self, line: str | None = None, **figure: Any) -> None:  # noqa: ANN401
        if figure:
            self.figures.append(figure)
        if line is not None:
            self.lines.append(line)


Check = Callable[[Rig, Result], None]


@dataclass(frozen=True)
class Section:
    """run(rig, result) fills the result; seconds: its budget on a GPU."""

    name: str
    run: Check
    seconds: float
    needs: str = ""
    """A section over the same model: where that one hung or took its process along, so would this
    one, and it is not begun."""


def lazily(module: str, name: str) -> Check:
    """A function that is imported when it runs: a package that is missing costs one section."""

    def run(rig: Rig, result: Result) -> None:
        getattr(importlib.import_module(module), name)(rig, result)

    return run


def gate(check: Check, rig: Rig, result: Result) -> None:
    """Raises what the check raises; other bits in company are told, and figures may follow."""
    try:
        check(rig, Result())
    except BitsDiffer as error:
        result.add(f"measured although bits differ: {error}", bits_differ=str(error))


@dataclass
class Outcome:
    """How a section ended and what it found until then."""

    name: str
    state: State
    seconds: float
    error: str = ""
    figures: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    lost: bool = False
    """The device is lost: nothing more can run in this process."""


def run_sections(
    rig: Rig, sections: Sequence[Section], told: Path, *, until: float = float("inf")
) -> None:
    """Run them one after the other; every beginning and end is appended to `told` at once.

    until  time.monotonic() at which everything ends; no section begins after it
    """
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # where it hangs, before it is ended
    for section in sections:
        if time.monotonic() >= until:
            return
        _tell(told, {"begin": section.name})
        outcome = run_section(rig, section, until=until)
        _tell(told, {"end": asdict(outcome)})
        if outcome.lost:
            return


def run_section(rig: Rig, section: Section, *, until: float = float("inf")) -> Outcome:
    """Whatever a section raises is its outcome."""
    from fader_server.engine.isolation import is_device_lost, is_out_of_memory

    started = time.monotonic()
    rig.deadline = min(started + section.seconds * rig.slack, until)
    result = Result()
    state: State = "ok"
    told, lost, full = "", False, False
    try:
        section.run(rig, result)
        if rig.on_gpu:
            torch.cuda.synchronize()
    except OutOfTime:
        whose = "the suite's time is spent" if rig.deadline == until else "its time is spent"
        state, told = "out of time", f"{whose} after {time.monotonic() - started:.0f} s"
    except Unavailable as error:
        state, told = "unavailable", str(error)
    except Exception as error:  # noqa: BLE001 - the border of a section: the others go on
        state, lost, full = "failed", is_device_lost(error), is_out_of_memory(error)
        told = f"{type(error).__name__}: {_one_line(error)}"
    seconds = round(time.monotonic() - started, 2)
    outcome = Outcome(section.name, state, seconds, told, result.figures, result.lines, lost)
    if full and rig.on_gpu:
        rig.kept.clear()
        torch.cuda.empty_cache()
    return outcome


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""


def _tell(told: Path, entry: Mapping[str, object]) -> None:
    with told.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry, default=str) + "\n")
