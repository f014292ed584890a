"""How fast, and in how much memory, a base is loaded: quantised by Fader, by bitsandbytes, or read.

Every run is a process of its own, the ways in turn. Knows the loader, no server.

    python -m bench.loading MODEL [--rounds 3] [--threads N] [--json FILE]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from fader_adapters.kernels.measure.quiet import QUIET, Others
from fader_server.bench.machine import machine_facts
from fader_server.bench.stats import spread
from fader_server.model import checkpoint, loader, writing

WAYS = ("native", "bitsandbytes", "nf4")
"""Quantise while loading with either quantiser, and load what `fader quantize` wrote."""
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Run:
    """One load, from the call to a base that is ready to run."""

    way: str
    seconds: float
    """Without Python's start and the import of torch."""
    read_seconds: float
    """Of `seconds`: until transformers had read and quantised, before the repacking."""
    weights: int
    """In the decoder's linears."""
    linear_bytes: int
    """Resident for them."""
    base_bytes: int
    """Resident for all of the base."""
    peak_bytes: int
    """Greatest anonymous memory above what the process had before; file pages are the kernel's."""
    kept_bytes: int
    """Of it at the end."""


def load(way: str, source: str) -> Run:
    """Load `source` in this process; `way` bitsandbytes hides the native quantiser only."""
    from fader_adapters.kernels.backend import choose
    from fader_adapters.kernels.native import available

    assert available(), "build the native library first"
    backend = choose(CPU, torch.bfloat16, "native")
    marks: list[float] = []
    install = loader.install

    def marked(*given: object, **named: object) -> object:
        marks.append(time.perf_counter())
        return install(*given, **named)  # pyright: ignore[reportArgumentType]

    loader.install = marked  # pyright: ignore[reportAttributeAccessIssue]
    if way == "bitsandbytes":
        checkpoint.native.available = lambda: False
    with _Watch() as watch:
        start = time.perf_counter()
        base = loader.load_base(source, dtype=torch.bfloat16, device=CPU, backend=backend)
        seconds = time.perf_counter() - start
    weights = sum(one.in_features * one.out_features for one in base.installed.spec.linears)
    return Run(
        way=way,
        seconds=seconds,
        read_seconds=marks[0] - start,
        weights=weights,
        linear_bytes=base.installed.nbytes,
        base_bytes=base.nbytes,
        peak_bytes=watch.peak - watch.before,
        kept_bytes=_anonymous() - watch.before,
    )


class _Watch:
    """The process's anonymous memory, looked at every 5 ms."""

    def __enter__(self) -> "_Watch":
        self.before = self.peak = _anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, _anonymous())


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this kernel does not tell RssAnon")


def same_tensors(source: str, other: Path) -> bool:
    """Whether `fader quantize` of `source` with bitsandbytes' quantiser equals `other`'s files."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = Path(folder) / "nf4"
        available, checkpoint.native.available = checkpoint.native.available, lambda: False
        try:
            writing.quantize(source, theirs, device=CPU)
        finally:
            checkpoint.native.available = available
        for path in sorted(theirs.glob("*.safetensors")):
            with safe_open(path, "pt") as a, safe_open(other / path.name, "pt") as b:
                names = set(a.keys())
                if names != set(b.keys()):
                    return False
                if not all(torch.equal(a.get_tensor(n), b.get_tensor(n)) for n in names):
                    return False
    return True


def main() -> None:
    """Prove that both quantisers write the same, then load in turn and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    if words.one:
        print(json.dumps(asdict(load(words.one, words.model))))
        return
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "nf4"
        writing.quantize(words.model, ready, device=CPU)
        if not same_tensors(words.model, ready):
            sys.exit("parity failed, no figures: the two quantisers wrote different tensors")
        runs, watch = [], Others()
        for _ in range(words.rounds):
            for way in WAYS:
                source = str(ready) if way == "nf4" else words.model
                command = [sys.executable, "-m", "bench.loading", source, "--one", way]
                command += ["--threads", str(words.threads)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs.append(Run(**json.loads(done.stdout.splitlines()[-1])))
    others = watch.share()
    _tell(runs)
    print(f"others used {others:.0%} of the processors")
    if not others <= QUIET:
        print("note: the machine was not quiet, do not quote these figures")
    if words.json:
        machine = machine_facts() | {"torch": torch.__version__, "threads": words.threads}
        command = ["python", "-m", "bench.loading", Path(words.model).name, *sys.argv[2:]]
        report = {"command": command, "machine": machine, "others": others}
        report["runs"] = [asdict(run) for run in runs]
        words.json.write_text(json.dumps(report, indent=1) + "\n")


def _tell(runs: list[Run]) -> None:
    for way in WAYS:
        chosen = [run for run in runs if run.way == way]
        speed = spread(run.weights / run.seconds / 1e6 for run in chosen)
        reading = spread(run.weights / run.read_seconds / 1e6 for run in chosen)
        one = max(chosen, key=lambda run: run.peak_bytes)
        print(
            f"{way:13} {speed.median:7.0f} Mparam/s [{speed.low:.0f}, {speed.high:.0f}]"
            f", without repacking {reading.median:.0f}"
            f"; peak {one.peak_bytes >> 20} MiB, kept {one.kept_bytes >> 20} MiB"
            f", {one.linear_bytes / one.weights:.4f} byte a weight"
        )


if __name__ == "__main__":
    main()
