"""The GPU suite without a GPU: every section runs, a wrong number leaves no figure."""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from bench import gpu_suite
from bench.gpu import programs, timing
from bench.gpu.section import (
    BitsDiffer,
    Outcome,
    OutOfTime,
    ParityFailed,
    Result,
    Rig,
    Section,
    Unavailable,
    gate,
    run_section,
)
from bench.gpu.section import run_sections as run_here
from tests.support.pretend_cuda import pretend, unavailable

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on the CPU")
ROOT = Path(__file__).parents[2]
ABSENT = {"server", "peft", "memcheck"}


def rig() -> Rig:
    return Rig(torch.device("cpu"), torch.float32, small=True)


QUICK = ("bandwidth", "parity nf4")


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


def test_sections_over_a_model_need_no_bitsandbytes() -> None:
    """A GPU may be where it is not: what is compared with it is left out, nothing else."""
    blocked = "import sys; sys.modules['bitsandbytes'] = None; "
    names = ("steps", "merged", "swaps", "ahead", "modules", "programs", "model")
    code = blocked + "; ".join(f"import bench.gpu.{name}" for name in names)
    tried = blocked + "import bitsandbytes.nn"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for source, works in ((code, True), (tried, False)):
        command = [sys.executable, "-c", source]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert (done.returncode == 0) is works, done.stderr


def test_a_package_that_a_needed_one_needs_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needed.py").write_text("import starlette_of_nowhere")
    (tmp_path / "there.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    programs.require(("there", "json"), 60.0)
    with pytest.raises(Unavailable, match="No module named 'starlette_of_nowhere'"):
        programs.require(("there", "needed"), 60.0)
    with pytest.raises(OutOfTime):
        programs.require(("there",), 1e-4)


def test_kernels_are_checked_on_a_gpu_without_the_projects_settings() -> None:
    plain = ("-c", "/dev/null", "--rootdir=.", "-p", "no:cacheprovider", "-p", "no:asyncio")
    command = [sys.executable, "-m", "pytest", *plain, "--collect-only", "-q", "tests/gpu"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "tests/gpu/test_graphs.py::" in done.stdout


@pytest.mark.skipif(bool(unavailable()), reason=unavailable())
def test_captures_share_one_stream() -> None:
    on: list[object] = []
    with pretend() as device:
        on_gpu = Rig(device.default.device, torch.float32, small=True)
        for _ in range(2):
            timing.captured(on_gpu, [lambda: on.append(torch.cuda.current_stream())])
    assert len(on) == 4
    assert set(on) == {on_gpu.kept["stream"]}


@pytest.mark.slow
def test_what_a_server_is_made_of_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    programs.require((*programs.SERVED, *programs.LATER), 300.0)


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
    from bench.gpu import deltas, figures, nf4_experts

    def wrong(rig: Rig, result: Result) -> None:
        raise ParityFailed("wrong")

    monkeypatch.setattr(figures, "check_nf4", wrong)
    monkeypatch.setattr(deltas, "check_lora", wrong)
    monkeypatch.setattr(nf4_experts, "check_nf4_experts", wrong)
    for run in (figures.measure_nf4, deltas.measure_lora, nf4_experts.measure_nf4_experts):
        outcome = run_section(rig(), Section("figures", run, 1.0))
        assert (outcome.state, outcome.figures) == ("failed", [])


def planted(
    names: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, total: float = 120.0
) -> tuple[int, dict[str, dict[str, Any]], float]:
    """Exit status, the JSON's sections by name, and seconds of a run of planted sections."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("bench.gpu.supervise.GRACE", 1.0)
    monkeypatch.setattr("bench.gpu.section.SLACK_OFF_GPU", 1.0)
    monkeypatch.setattr(gpu_suite, "TOTAL_OFF_GPU", total)
    told, began = tmp_path / "told.json", time.monotonic()
    table = ["--table", "tests.bench.planted_sections"]
    code = gpu_suite.main(["--dry", *table, "--only", ",".join(names), "--json", str(told)])
    seconds = time.monotonic() - began
    return code, {s["name"]: s for s in json.loads(told.read_text())["sections"]}, seconds


@pytest.mark.slow
def test_a_crash_a_hang_and_an_overrun_cost_one_section_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("good", "raises", "absent", "crashes", "after", "hangs", "over it", "overruns", "last")
    code, found, _ = planted(names, tmp_path, monkeypatch)
    assert code == 1
    assert {name: s["state"] for name, s in found.items()} == {
        "good": "ok",
        "raises": "failed",
        "absent": "failed",
        "crashes": "killed",
        "after": "ok",
        "hangs": "killed",
        "over it": "unavailable",
        "overruns": "out of time",
        "last": "ok",
    }
    assert found["raises"]["error"] == "ValueError: planted"
    assert "no_such_package" in found["absent"]["error"]
    assert "its process died (3); last words" in found["crashes"]["error"]
    assert "planted_sections.py" in found["hangs"]["error"], "where it hung"
    assert found["overruns"]["figures"] == [{"turn": 1}], "what was measured before stays"
    table = capsys.readouterr().out
    for name, section in found.items():
        assert name in table
        assert section["error"] in table


def test_sections_that_are_well_or_absent_are_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, found, _ = planted(("good", "unavailable"), tmp_path, monkeypatch)
    assert (code, {s["state"] for s in found.values()}) == (0, {"ok", "unavailable"})


@pytest.mark.slow
def test_the_whole_ends_in_time_with_its_children_however_long_sections_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED_PID", str(tmp_path / "pid"))
    monkeypatch.setattr("bench.gpu.supervise.REPLACE_SECONDS", 1.0)
    total = 9.0 + gpu_suite.LAST_WORDS
    names = ("hangs with a child", "last")
    code, found, seconds = planted(names, tmp_path, monkeypatch, total=total)
    assert code == 1
    assert [s["state"] for s in found.values()] == ["out of time", "out of time"]
    assert seconds < total + 6
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_budgets_fit_into_nine_minutes() -> None:
    from bench.gpu import supervise

    ending = supervise.DUMP_SECONDS + supervise.POLL + 5 + 5
    assert gpu_suite.TOTAL_SECONDS + ending < 9 * 60
    for section in gpu_suite.sections():
        assert 0 < section.seconds < gpu_suite.TOTAL_SECONDS / 2


def test_figures_follow_where_only_bits_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_bits(rig: Rig, result: Result) -> None:
        raise BitsDiffer("row 3")

    result = Result()
    gate(other_bits, rig(), result)
    assert result.figures == [{"bits_differ": "row 3"}]
    with pytest.raises(ParityFailed, match="wrong"):
        gate(failing, rig(), result)


def test_every_section_of_the_table_is_there() -> None:
    import bench.gpu

    for section in gpu_suite.sections():
        closed = [cell.cell_contents for cell in section.run.__closure__ or ()]
        module, name = sorted(closed, key=lambda word: not word.startswith(bench.gpu.__name__))
        assert callable(getattr(importlib.import_module(module), name)), section.name
        assert not section.needs or section.needs in {s.name for s in gpu_suite.sections()}


def test_beginnings_and_ends_are_told_at_once(tmp_path: Path) -> None:
    told = tmp_path / "told"
    run_here(
        rig(), [Section("good", lambda rig, result: None, 1.0), Section("bad", failing, 1.0)], told
    )
    entries = [json.loads(line) for line in told.read_text().splitlines()]
    assert [next(iter(entry)) for entry in entries] == ["begin", "end", "begin", "end"]
    assert Outcome(**entries[3]["end"]).state == "failed"


def test_without_a_gpu_only_a_dry_run_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--only", "bandwidth"]) == 2
    assert "--dry" in capsys.readouterr().err
