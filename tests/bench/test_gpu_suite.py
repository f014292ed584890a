"""The GPU suite without a GPU: every section runs, a wrong number leaves no figure."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from bench import gpu_suite
from bench.gpu.section import Outcome, OutOfTime, ParityFailed, Result, Rig, Section, run_section
from bench.gpu.section import run_sections as run_here
from bench.gpu.supervise import supervise

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on the CPU")
ROOT = Path(__file__).parents[2]
ABSENT = {"server", "peft", "memcheck"}


def rig() -> Rig:
    return Rig(torch.device("cpu"), torch.float32, small=True)


QUICK = ("bandwidth", "parity nf4", "graphs", "decode", "swap")


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param((), marks=pytest.mark.slow)], ids=["quick", "all"]
)
def test_sections_run_dry(names: Sequence[str], tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    command = [sys.executable, "-m", "bench.gpu_suite", "--dry", "--json", str(told)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    only = ["--only", ",".join(names)] if names else []
    done = subprocess.run([*command, *only], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(told.read_text())
    every = names or [section.name for section in gpu_suite.sections()]
    states = {s["name"]: s["state"] for s in document["sections"]}
    assert states == {name: "unavailable" if name in ABSENT else "ok" for name in every}
    assert document["dry"]
    assert all(s["figures"] for s in document["sections"] if s["name"] not in ABSENT)


def failing(rig: Rig, result: Result) -> None:
    result.add("a first line", first=1)
    raise ParityFailed("wrong")


def test_a_failing_section_keeps_what_it_found_and_the_next_one_runs() -> None:
    outcomes = [
        run_section(rig(), Section(name, run, 1.0))
        for name, run in {"bad": failing, "good": lambda rig, result: result.add(a=1)}.items()
    ]
    assert [o.state for o in outcomes] == ["failed", "ok"]
    assert [o.figures for o in outcomes] == [[{"first": 1}], [{"a": 1}]]
    assert outcomes[0].error == "ParityFailed: wrong"


def test_a_section_past_its_budget_ends_with_its_figures() -> None:
    def slow(rig: Rig, result: Result) -> None:
        result.add(a=1)
        rig.deadline = 0.0
        rig.check_time()

    outcome = run_section(rig(), Section("slow", slow, 1.0))
    assert (outcome.state, outcome.figures) == ("out of time", [{"a": 1}])
    with pytest.raises(OutOfTime):
        Rig(torch.device("cpu"), torch.float32, True, deadline=0.0).check_time()


def test_wrong_numbers_leave_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu import figures

    def wrong(rig: Rig, result: Result) -> None:
        raise ParityFailed("wrong")

    monkeypatch.setattr(figures, "check_nf4", wrong)
    monkeypatch.setattr(figures, "check_lora", wrong)
    for run in (figures.measure_nf4, figures.measure_lora):
        outcome = run_section(rig(), Section("figures", run, 1.0))
        assert (outcome.state, outcome.figures) == ("failed", [])


CHILD = """
import sys, json
from pathlib import Path
told, names = Path(sys.argv[1]), sys.argv[2].split(",")
for name in names:
    with told.open("a") as file:
        file.write(json.dumps({"begin": name}) + "\\n")
    if name == "dies":
        sys.exit(3)
    if name == "hangs":
        import time
        time.sleep(600)
    end = {"name": name, "state": "ok", "seconds": 0.0, "lost": name == "loses"}
    with told.open("a") as file:
        file.write(json.dumps({"end": end}) + "\\n")
    if name == "loses":
        sys.exit(0)
"""


def nothing(rig: Rig, result: Result) -> None:
    pass


def test_sections_after_one_that_dies_hangs_or_loses_the_device_still_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.gpu.supervise.GRACE", 1.0)
    begun: list[list[str]] = []

    def command(names: Sequence[str], told: Path) -> list[str]:
        begun.append(list(names))
        return [sys.executable, "-c", CHILD, str(told), ",".join(names)]

    names = ["a", "dies", "b", "loses", "c", "hangs", "d"]
    outcomes = supervise([Section(n, nothing, 0.5) for n in names], command, seconds=60)
    assert [o.state for o in outcomes] == ["ok", "killed", "ok", "ok", "ok", "killed", "ok"]
    assert [group[0] for group in begun] == ["a", "b", "c", "d"]


def test_what_the_suites_time_does_not_reach_is_told() -> None:
    outcomes = supervise([Section("late", nothing, 1.0)], lambda names, told: [], seconds=-1.0)
    assert [o.state for o in outcomes] == ["out of time"]


def test_beginnings_and_ends_are_told_at_once(tmp_path: Path) -> None:
    told = tmp_path / "told"
    run_here(rig(), [Section("good", nothing, 1.0), Section("bad", failing, 1.0)], told)
    entries = [json.loads(line) for line in told.read_text().splitlines()]
    assert [next(iter(entry)) for entry in entries] == ["begin", "end", "begin", "end"]
    assert Outcome(**entries[3]["end"]).state == "failed"


def test_without_a_gpu_only_a_dry_run_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--only", "bandwidth"]) == 2
    assert "--dry" in capsys.readouterr().err
