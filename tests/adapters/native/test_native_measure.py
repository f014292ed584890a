"""The benchmark of the kernels: no figure without parity, limits taken beside what they limit."""

import dataclasses
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fader_adapters.errors import KernelUnavailable
from fader_adapters.kernels import native
from fader_adapters.kernels.measure import parity, quiet, report, timing
from fader_adapters.kernels.measure.cases import Sizes
from fader_adapters.kernels.measure.limits import Reached
from fader_adapters.kernels.measure.parity import ParityFailed
from fader_adapters.kernels.native import library

TINY = Sizes(
    shapes=((64, 64), (48, 128)),
    rows=(1, 3),
    sites=((64, 64),),
    head=(96, 64),
    attention=((2, 3, 20),),
    quantise=(64, 64),
    streamed=1 << 20,
)


@pytest.fixture(scope="module")
def measured() -> report.Report:
    """A run of the tiny sizes; its figures are taken once, and read by several tests."""
    if not native.available():
        pytest.skip(native.reason())
    state = torch.get_rng_state()
    result = report.run(TINY, repeats=2)
    assert torch.equal(torch.get_rng_state(), state)
    return result


def test_parity_holds_on_every_instruction_set(level: str) -> None:
    errors = parity.prove()
    assert errors.keys() == parity.BOUNDS.keys()
    assert 0 < errors["gemm"] <= 2e-3 or level != "avx512_bf16"
    assert errors["quantise"] == 0


@pytest.mark.parametrize("kernel", sorted(parity.BOUNDS))
def test_one_wrong_kernel_stops_the_run_before_any_timing(
    built: None, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(got: torch.Tensor) -> torch.Tensor:
        got.view(-1)[7] += 1
        return got

    pack = native.PlainPanels.pack
    names = {"attention": "paged_attention", "quantise": "quantise_nf4", "dense": "PlainPanels"}
    name = names.get(kernel, kernel)
    original = getattr(native, name)

    def wrong(*args, **kwargs):
        made = original(*args, **kwargs)
        if kernel == "quantise":
            spoil(made.packed)
            return made
        return spoil(made)

    other = SimpleNamespace(pack=lambda weight: pack(spoil(weight.clone())))
    monkeypatch.setattr(parity.native, name, other if kernel == "dense" else wrong)
    monkeypatch.setattr(report.cases, "gemm", lambda *_: pytest.fail("timed a wrong kernel"))
    with pytest.raises(ParityFailed, match=f"no figures: {kernel} "):
        report.run(TINY, repeats=2)


def test_nan_is_not_parity(built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "dense", lambda: float("nan"))
    with pytest.raises(ParityFailed, match="dense nan"):
        parity.prove()


def test_every_case_is_timed_and_told(measured: report.Report) -> None:
    result = measured
    cases = {(one.case, one.method) for one in result.timings}
    gemms = [f"gemm {n}x{k} M={rows}" for n, k in TINY.shapes for rows in TINY.rows]
    assert list(result.limits) == gemms
    for gemm in gemms:
        assert {(gemm, "native"), (gemm, "torch bf16")} <= cases
        assert result.limits[gemm].read_gb_s > 0
        assert result.limits[gemm].dot_gflop_s > 0
    assert ("site 64x64 r=16 M=8", "8 adapters, 2 terms") in cases
    assert ("quantise 64x64", "bitsandbytes") in cases
    assert all(0 < t.best_ms <= t.median_ms for t in result.timings)
    told = list(report.lines(result))
    shown = [case for case, method in cases if not method.startswith("limit")]
    assert sum(
        line.startswith(("gemm", "site", "lm_head", "att", "quant")) for line in told
    ) == len(shown)


def test_short_calls_are_timed_in_rows_and_long_ones_alone() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(1.5 * timing.TURN)

    quick, long = timing.interleave(
        "c", {"quick": lambda: order.append("quick"), "slow": slow}, repeats=3
    )
    assert (quick.calls, long.calls) == (timing.LONGEST, 1)
    assert quick.median_ms < 0.1 < 1.5e3 * timing.TURN <= long.best_ms
    turns = [name for name, _ in itertools.groupby(order)]
    assert turns == ["quick", "slow"] * 4  # one round to find out, three measured


def test_shares_are_of_the_limits_of_the_same_case() -> None:
    told = report.share("gemm 1000x1600 M=2", 0.9, Reached(2.0, 71.111))
    assert told == "  1.0 GB/s =  50% of read,  10% of dot"


def test_figures_of_a_busy_machine_are_not_for_quoting(measured: report.Report) -> None:
    for others, calm in ((0.0, True), (0.5, False), (float("nan"), False)):
        told = list(report.lines(dataclasses.replace(measured, others=others)))
        assert ("not quiet" in told[-1]) is not calm


def test_work_of_another_process_counts_and_own_work_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    readings = iter([(10.0, 100.0), (18.0, 110.0)])  # 8 of 10 seconds were busy
    own = iter([1.0, 6.0])
    monkeypatch.setattr(quiet, "_counters", lambda: next(readings))
    monkeypatch.setattr(quiet, "_own", lambda: next(own))
    assert quiet.Others().share() == pytest.approx(0.3)
    monkeypatch.undo()
    watch, waited = quiet.Others(), quiet.Others()
    code = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    child = [sys.executable, "-c", code]
    with subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        running = watch.share()
        other.communicate(b"\n")
    assert running > 0.1 / (os.cpu_count() or 1)
    assert waited.share() < running  # a child that was waited for is own work


def test_without_the_library_there_is_nothing_to_measure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "LIBRARY", "never_built.so")
    library._attempt.cache_clear()
    try:
        with pytest.raises(KernelUnavailable, match=r"never_built\.so was not built"):
            report.run(TINY, repeats=2)
    finally:
        monkeypatch.undo()
        library._attempt.cache_clear()
