"""One real server over the demo, as a newcomer would start it: a process and a socket."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
import pytest

from fader_server import demo


@dataclass
class Running:
    """A server process and where it listens."""

    url: str
    process: subprocess.Popen[str]
    root: Path
    """The --adapter-dir."""
    lines: list[dict]
    """Its log so far."""

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples without histogram buckets."""
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in self.get("/metrics").text.splitlines()
            if line.split("{")[0].split(" ")[0] == name
        ]
        assert values, f"no metric {name}"
        return sum(values)

    def terminate(self) -> int:
        """End it as an operator would; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave no process and no pipe behind, whatever the test made of it."""
        with self.process:
            self.process.kill()


def start(root: Path, *flags: str, **variables: str) -> Running:
    """Start `fader serve` on a free port and wait until it says where it listens."""
    command = [sys.executable, "-m", "fader_server", "serve", "--port", "0"]
    command += ["--adapter-dir", str(root), "--drain-grace", "0", "--warm-up", "0", *flags]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    environment |= variables
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    lines: list[dict] = []
    listening = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("{"):
                lines.append(json.loads(line))
                if lines[-1].get("event") == "serving":
                    listening.set()
        listening.set()

    threading.Thread(target=read, daemon=True).start()
    if not listening.wait(120) or process.poll() is not None:
        with process:
            process.kill()
        pytest.fail(f"the server did not start: {lines}")
    port = next(line["port"] for line in lines if line["event"] == "serving")
    return Running(f"http://127.0.0.1:{port}", process, root, lines)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("adapters")
    for name in ("shout", "german"):
        shutil.copytree(demo.adapter_dirs()[name], root / f"copy-of-{name}")
    with start(root, "--warm-up", "1") as running:
        yield running
        assert running.terminate() == 0
