"""Sections that are programs of their own: compute-sanitizer, and a server over loopback."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from bench.gpu.section import OutOfTime, ParityFailed, Result, Rig, Unavailable

SERVED = ("fader_server.assembly", "fader_server.cli", "fader_server.bench.serve")
"""What a server and its load are made of."""
LATER = ("accelerate", "bitsandbytes")
"""Packages that are imported when a base is read."""
LOAD = ("--adapters", "all", "--compare", "base,uniform", "--concurrency", "16", "--requests", "96")
"""Of `fader bench serve`: the base, then its adapters in turn, interleaved."""


def check_memory(rig: Rig, result: Result) -> None:
    """Every kernel on small shapes under compute-sanitizer's memcheck, no caching allocator."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not rig.on_gpu or not Path(found).exists():
        raise Unavailable("compute-sanitizer is not on this machine")
    suite = [sys.executable, "-m", "bench.gpu_suite", "--small", "--in-process"]
    suite += ["--only", "parity nf4,parity lora,parity attention"]
    command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", found, "--tool", "memcheck"]
    command += ["--target-processes", "all", "--error-exitcode", "99", *suite]
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        with (
            said.open("w") as file,
            program([*command, "--json", f"{folder}/told.json"], file) as process,
        ):
            try:
                code = process.wait(rig.left)
            except subprocess.TimeoutExpired as error:
                raise OutOfTime from error
        told = said.read_text(errors="replace")
    if "ERROR SUMMARY" not in told:
        last = told.strip().splitlines()[-1:] or ["it said nothing"]
        raise Unavailable(f"compute-sanitizer does not run here: {last[0][:200]}")
    errors = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", told)]
    if sum(errors) or code:
        first = next(
            (line for line in told.splitlines() if "=========" in line and "Invalid" in line), ""
        )
        raise ParityFailed(f"{sum(errors)} memory errors, exit code {code} {first[:200]}")
    result.add("compute-sanitizer memcheck: 0 errors on small shapes", memory_errors=0)


def measure_server(rig: Rig, result: Result) -> None:
    """The demo served on the device, loaded over loopback by `fader bench serve`."""
    if not rig.on_gpu:
        raise Unavailable("a server over loopback is measured on a GPU only")
    require((*SERVED, *LATER), rig.left)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fader, url = [sys.executable, "-m", "fader_server"], f"http://127.0.0.1:{port}"
    serve = [*fader, "serve", "--device", "cuda", "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryDirectory() as folder:
        log, told, said = (Path(folder) / name for name in ("log", "bench.json", "said"))
        with log.open("w") as file, program(serve, file) as server:
            _wait(f"{url}/ready", server, log, rig)
            load = [*fader, "bench", "serve", "--url", url, "--json", str(told), *LOAD]
            with said.open("w") as answers, program(load, answers) as client:
                try:
                    code = client.wait(rig.left)
                except subprocess.TimeoutExpired as error:
                    raise OutOfTime from error
        lines = said.read_text(errors="replace").splitlines()
        if code:
            raise ParityFailed(f"fader bench serve: {' '.join(lines)[-300:]}")
        result.add(
            "the demo over loopback: every answer right; "
            + " | ".join(" ".join(line.split()) for line in lines[-3:]),
            serve=json.loads(told.read_text()),
            log=[line for line in log.read_text().splitlines() if "graphs" in line],
        )


def require(modules: Sequence[str], seconds: float) -> None:
    """Raises Unavailable where a process of its own cannot import them: a package that one of them
    needs counts as much as one that is named. OutOfTime."""
    command = [sys.executable, "-c", f"import {', '.join(modules)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise OutOfTime from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise Unavailable(f"a server cannot run on this machine: {last[0][:200]}")


@contextmanager
def program(command: Sequence[str], file: IO[str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A program that writes to `file`; at the end nothing of what it started is left.

    A group of its own, but the section's session: who ends that ends this, too.
    """
    process = subprocess.Popen(command, stdout=file, stderr=file, process_group=0)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)


def _wait(url: str, server: "subprocess.Popen[bytes]", log: Path, rig: Rig) -> None:
    while server.poll() is None:
        rig.check_time()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    last = log.read_text().strip().splitlines()[-1:] or [""]
    raise ParityFailed(f"the server did not become ready: {last[0][:300]}")
