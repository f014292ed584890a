"""Sections that are programs of their own: compute-sanitizer, and a server over loopback."""

import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from bench.gpu.section import ParityFailed, Result, Rig, Unavailable

SANITIZER_SECONDS = 100
SERVER_SECONDS = 100
LOAD = ("--adapters", "all", "--compare", "base,uniform", "--concurrency", "16", "--requests", "96")
"""Of `fader bench serve`: the base, then its adapters in turn, interleaved."""


def check_memory(rig: Rig, result: Result) -> None:
    """Every kernel on small shapes under compute-sanitizer's memcheck, no caching allocator."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not rig.on_gpu or not Path(found).exists():
        raise Unavailable("compute-sanitizer is not on this machine")
    suite = [sys.executable, "-m", "bench.gpu_suite", "--small", "--in-process"]
    command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", found, "--tool", "memcheck"]
    command += ["--target-processes", "all", "--error-exitcode", "99", *suite]
    with tempfile.TemporaryDirectory() as folder:
        json_file = str(Path(folder) / "told.json")
        try:
            done = subprocess.run(
                [
                    *command,
                    "--only",
                    "parity nf4,parity lora,parity attention",
                    "--json",
                    json_file,
                ],
                capture_output=True,
                text=True,
                timeout=SANITIZER_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"compute-sanitizer took over {SANITIZER_SECONDS} s") from error
    told = done.stdout + done.stderr
    if "ERROR SUMMARY" not in told:
        last = told.strip().splitlines()[-1:] or ["it said nothing"]
        raise Unavailable(f"compute-sanitizer does not run here: {last[0][:200]}")
    errors = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", told)]
    if sum(errors) or done.returncode:
        first = next(
            (line for line in told.splitlines() if "=========" in line and "Invalid" in line), ""
        )
        raise ParityFailed(
            f"{sum(errors)} memory errors, exit code {done.returncode} {first[:200]}"
        )
    result.add("compute-sanitizer memcheck: 0 errors on small shapes", memory_errors=0)


def measure_server(rig: Rig, result: Result) -> None:
    """The demo served on the device, loaded over loopback by `fader bench serve`."""
    for name in (
        "bitsandbytes",
        "fastapi",
        "uvicorn",
        "typer",
        "httpx",
        "prometheus_client",
        "rich",
    ):
        if importlib.util.find_spec(name) is None:
            raise Unavailable(f"{name} is not installed on this machine")
    if not rig.on_gpu:
        raise Unavailable("a server over loopback is measured on a GPU only")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fader = [sys.executable, "-m", "fader_server"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as errors:
            server = subprocess.Popen(
                [*fader, "serve", "--device", "cuda", "--host", "127.0.0.1", "--port", str(port)],
                stderr=errors,
                stdout=errors,
            )
        try:
            _wait(f"http://127.0.0.1:{port}/ready", server, log)
            told = Path(folder) / "bench.json"
            load = ["bench", "serve", "--url", f"http://127.0.0.1:{port}", "--json", str(told)]
            done = subprocess.run(
                [*fader, *load, *LOAD], capture_output=True, text=True, timeout=SERVER_SECONDS
            )
            if done.returncode:
                raise ParityFailed(f"fader bench serve: {(done.stderr or done.stdout)[-300:]}")
            result.add(
                "the demo over loopback: every answer right; "
                + " | ".join(" ".join(line.split()) for line in done.stdout.splitlines()[-3:]),
                serve=json.loads(told.read_text()),
                log=[line for line in log.read_text().splitlines() if "graphs" in line],
            )
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + SERVER_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    last = log.read_text().strip().splitlines()[-1:] or [""]
    raise ParityFailed(f"the server did not become ready: {last[0][:300]}")
