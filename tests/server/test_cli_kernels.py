"""`fader bench kernels`: exit codes, what is printed, what is written."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fader_adapters.errors import KernelUnavailable
from fader_adapters.kernels import native
from fader_adapters.kernels.measure import parity, report
from fader_adapters.kernels.measure.cases import Sizes
from fader_server.cli import main

TINY = Sizes(
    shapes=((64, 64),),
    rows=(1,),
    sites=((64, 64),),
    head=(96, 64),
    attention=((1, 1, 16),),
    quantise=(64, 64),
    streamed=1 << 20,
)
needs_library = pytest.mark.skipif(not native.available(), reason=native.reason())


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "Sizes", lambda: TINY)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


@needs_library
def test_a_good_run_prints_figures_and_writes_them_with_machine_and_command(capsys, tmp_path: Path):
    target = tmp_path / "kernels.json"
    assert main(["bench", "kernels", "--repeats", "2", "--json", str(target)]) == 0
    told = capsys.readouterr().out
    assert "parity: gemm" in told
    assert "gemm 64x64 M=1" in told
    written = json.loads(target.read_text())
    assert written["machine"]["cores"]
    assert written["kernels"]["torch"] == torch.__version__
    assert written["command"]
    assert {t["method"] for t in written["timings"]} >= {"native", "torch bf16", "bitsandbytes"}


@needs_library
def test_wrong_kernels_end_in_1_without_figures(capsys, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(parity, "delta", lambda: 0.1)
    target = tmp_path / "kernels.json"
    assert main(["bench", "kernels", "--repeats", "2", "--json", str(target)]) == 1
    told = capsys.readouterr()
    assert "parity failed, no figures: delta" in told.err
    assert " ms" not in told.out
    assert not target.exists()


def test_a_machine_without_the_library_is_told_what_to_do(capsys, monkeypatch):
    def refuse(*_, **__):
        raise KernelUnavailable("there are no native kernels to measure: run the build")

    monkeypatch.setattr(report, "run", refuse)
    assert main(["bench", "kernels"]) == 2
    assert capsys.readouterr().err == (
        "fader: there are no native kernels to measure: run the build\n"
    )


@pytest.mark.parametrize("words", [["--repeats", "1"], ["--threads", "0"]])
def test_numbers_that_measure_nothing_are_refused(words, capsys):
    assert main(["bench", "kernels", *words]) == 2
    assert words[0] in capsys.readouterr().err


def test_the_command_line_imports_no_torch_until_a_command_needs_it():
    code = "import sys, fader_server.cli; sys.exit('torch' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )
    assert importlib.util.find_spec("torch")
