"""One command that proves the CUDA backend on a GPU and measures it: parity first, then figures.

    python -m bench.gpu_suite [--only NAME,NAME] [--json FILE]

Runs in under nine minutes on an H200, each section within a budget and failing alone; the table
comes last. --dry runs every section on tiny shapes, in Triton's interpreter where there is no GPU:
its times mean nothing, its parity does. --small keeps the tiny shapes on a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.gpu.section import Outcome, Rig, Section

TOTAL_SECONDS = 510.0
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "peft", "fastapi", "numpy")


def sections() -> "tuple[Section, ...]":
    """In the order of their worth, so that what is cut off at the end is what is missed least."""
    from bench.gpu import figures, parity, peers, programs, steps, swaps
    from bench.gpu.section import Section

    return (
        Section("bandwidth", figures.measure_bandwidth, 20),
        Section("parity nf4", parity.check_nf4, 40),
        Section("parity lora", parity.check_lora, 60),
        Section("parity attention", parity.check_attention, 40),
        Section("graphs", steps.check_graphs, 140),
        Section("decode", steps.measure_decode, 40),
        Section("adapters", steps.measure_adapters, 50),
        Section("swap", swaps.measure_swap, 30),
        Section("prefill", steps.measure_prefill, 30),
        Section("nf4", figures.measure_nf4, 70),
        Section("lora", figures.measure_lora, 60),
        Section("server", programs.measure_server, 120),
        Section("peft", peers.measure_peft, 80),
        Section("memcheck", programs.check_memory, 110),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when nothing was wrong; unavailable sections are no fault."""
    words = _words(arguments)
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        if not words.dry:
            sys.stderr.write("gpu_suite: torch finds no CUDA device; --dry runs without one\n")
            return 2
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton
    rig = _rig(small=words.dry or words.small, on_gpu=on_gpu)
    wanted = [s for s in sections() if not words.only or s.name in words.only.split(",")]
    if words.told is not None:
        from bench.gpu.section import run_sections

        run_sections(rig, wanted, words.told)
        return 0
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    outcomes = _run(words, rig, wanted)
    document = {
        "command": ["python", "-m", "bench.gpu_suite", *(arguments or sys.argv[1:])],
        "started": started,
        "seconds": round(time.monotonic() - clock, 1),
        "dry": words.dry or words.small,
        "machine": _machine(on_gpu),
        "sections": [asdict(outcome) for outcome in outcomes],
    }
    words.json.write_text(json.dumps(document, indent=1) + "\n")
    _table(outcomes, document)
    return 1 if any(o.state in ("failed", "killed") for o in outcomes) else 0


def _words(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--dry", action="store_true", help="tiny shapes, on a CPU too")
    parser.add_argument("--small", action="store_true", help="tiny shapes on a GPU")
    parser.add_argument("--only", default="", help="names of sections, with commas between")
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--in-process", action="store_true", help="no process of their own")
    parser.add_argument("--told", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _rig(*, small: bool, on_gpu: bool) -> "Rig":
    import torch

    from bench.gpu.section import Rig

    torch.manual_seed(0)
    if on_gpu:
        return Rig(torch.device("cuda", 0), torch.bfloat16, small)
    return Rig(torch.device("cpu"), torch.float32, small)


def _run(words: argparse.Namespace, rig: "Rig", wanted: "Sequence[Section]") -> "list[Outcome]":
    from bench.gpu.section import run_section
    from bench.gpu.supervise import supervise

    if words.in_process or not rig.on_gpu:
        return [run_section(rig, section) for section in wanted]
    flags = ["--dry"] * words.dry + ["--small"] * words.small

    def command(names: Sequence[str], told: Path) -> list[str]:
        suite = [sys.executable, "-m", "bench.gpu_suite", "--told", str(told), *flags]
        return [*suite, "--only", ",".join(names)]

    return supervise(wanted, command, seconds=TOTAL_SECONDS)


def _machine(on_gpu: bool) -> dict[str, Any]:
    from fader_server.bench.machine import machine_facts

    facts = machine_facts() | {"versions": {name: _version(name) for name in PACKAGES}}
    if on_gpu:
        import torch

        device = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": device.name,
            "capability": f"{device.major}.{device.minor}",
            "multiprocessors": device.multi_processor_count,
            "memory_bytes": device.total_memory,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return facts


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError:
        return None


def _table(outcomes: "Sequence[Outcome]", document: dict[str, Any]) -> None:
    gpu = document["machine"].get("gpu", {}).get("name", "no GPU, interpreted")
    print(f"\n{gpu}, {document['seconds']:.0f} s in all")
    for outcome in outcomes:
        told = f": {outcome.error}" if outcome.error else ""
        print(f"{outcome.name:17} {outcome.state:11} {outcome.seconds:6.1f} s{told}")
        for line in outcome.lines:
            print(f"    {line}")


if __name__ == "__main__":
    sys.exit(main())
