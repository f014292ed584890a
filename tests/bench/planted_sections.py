"""Sections that end in every way a section can, in the place of the suite's own."""

import os
import subprocess
import sys
import time
from pathlib import Path

from bench.gpu import section
from bench.gpu.section import Result, Rig, Section, Unavailable, lazily

section.SLACK_OFF_GPU = 1.0  # in the process that runs them


def good(rig: Rig, result: Result) -> None:
    result.add("a line", figure=1)


def raises(rig: Rig, result: Result) -> None:
    raise ValueError("planted")


def unavailable(rig: Rig, result: Result) -> None:
    raise Unavailable("planted")


def crashes(rig: Rig, result: Result) -> None:
    sys.stderr.write("last words\n")
    sys.stderr.flush()
    os._exit(3)


def hangs(rig: Rig, result: Result) -> None:
    time.sleep(600)


def hangs_with_a_child(rig: Rig, result: Result) -> None:
    child = subprocess.Popen(["sleep", "600"], process_group=0)
    Path(os.environ["PLANTED_PID"]).write_text(str(child.pid))
    hangs(rig, result)


def overruns(rig: Rig, result: Result) -> None:
    result.add(turn=1)
    while True:
        time.sleep(0.02)
        rig.check_time()


def sections() -> tuple[Section, ...]:
    return (
        Section("good", good, 5),
        Section("unavailable", unavailable, 5),
        Section("raises", raises, 5),
        Section("absent", lazily("no_such_package", "run"), 5),
        Section("crashes", crashes, 5),
        Section("after", good, 5),
        Section("hangs", hangs, 0.5),
        Section("over it", good, 5, "hangs"),
        Section("overruns", overruns, 0.5),
        Section("hangs with a child", hangs_with_a_child, 300),
        Section("last", good, 5),
    )
