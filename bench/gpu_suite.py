"""One command that proves the CUDA backend on a GPU and measures it: parity first, then figures.

    python -m bench.gpu_suite [--only NAME,NAME] [--json PATH]

Ends in under nine minutes whatever happens: each section has a budget, runs in a process that can
be replaced and fails alone; the JSON grows with every section and the table comes last. Exit status
0: nothing failed and nothing was cut short. --dry runs every section on tiny shapes, in Triton's
interpreter where there is no GPU: its times mean nothing, its parity does. --small keeps the tiny
shapes on a GPU.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.gpu.section import Outcome, Rig, Section

TOTAL_SECONDS = 515.0
"""When the last process is ended."""
LAST_WORDS = 8.0
"""Seconds before that at which sections end by themselves."""
TOTAL_OFF_GPU = 3600.0
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "peft", "fastapi", "numpy")
FINE = ("ok", "unavailable")


def sections() -> "tuple[Section, ...]":
    """In the order of their worth, so that what is cut off at the end is what is missed least."""
    from bench.gpu.section import Section, lazily

    def section(name: str, module: str, run: str, seconds: float, needs: str = "") -> Section:
        return Section(name, lazily(f"bench.gpu.{module}", run), seconds, needs)

    return (
        section("bandwidth", "figures", "measure_bandwidth", 25),
        section("parity nf4", "parity", "check_nf4", 60),
        section("parity lora", "parity", "check_lora", 75),
        section("parity join", "deltas", "check_join", 45),
        section("parity attention", "parity", "check_attention", 60),
        section("parity modules", "modules", "check_modules", 45),
        section("parity experts", "experts", "check_experts", 45),
        section("parity nf4 experts", "nf4_experts", "check_nf4_experts", 25),
        section("draws", "draws", "measure_draws", 15),
        section("states", "states", "measure_states", 30),
        section("graphs", "steps", "check_graphs", 140),
        section("decode", "steps", "measure_decode", 30, "graphs"),
        section("ahead", "ahead", "measure_ahead", 20, "graphs"),
        section("adapters", "steps", "measure_adapters", 40, "graphs"),
        section("swap", "swaps", "measure_swap", 25, "graphs"),
        section("prompts", "prompts", "check_prompts", 25, "graphs"),
        section("prefill", "prompts", "measure_prefill", 40, "graphs"),
        section("nf4", "figures", "measure_nf4", 60),
        section("lora", "deltas", "measure_lora", 60),
        section("experts", "experts", "measure_experts", 30),
        section("nf4 experts", "nf4_experts", "measure_nf4_experts", 40),
        section("sweep", "sweep", "sweep_nf4", 80),
        section("sweep prefill", "sweep", "sweep_prefill", 25),
        section("merged", "merged", "measure_merged", 60, "graphs"),
        section("peft", "peers", "measure_peft", 80),
        section("server", "programs", "measure_server", 120),
        section("memcheck", "programs", "check_memory", 110),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when nothing was wrong; unavailable sections are no fault."""
    words = _words(arguments)
    began = time.monotonic()
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        if not words.dry:
            sys.stderr.write("gpu_suite: torch finds no CUDA device; --dry runs without one\n")
            return 2
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton
    rig = _rig(small=words.dry or words.small, on_gpu=on_gpu)
    every = importlib.import_module(words.table).sections()
    wanted = [s for s in every if not words.only or s.name in words.only.split(",")]
    if words.told is not None:
        from bench.gpu.section import run_sections

        run_sections(rig, wanted, words.told, until=words.until)
        return 0
    document = {
        "command": ["python", "-m", "bench.gpu_suite", *(arguments or sys.argv[1:])],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "dry": words.dry or words.small,
        "machine": _machine(on_gpu),
    }

    def note(outcomes: "list[Outcome]") -> None:
        document["seconds"] = round(time.monotonic() - began, 1)
        document["sections"] = [asdict(outcome) for outcome in outcomes]
        words.json.write_text(json.dumps(document, indent=1, default=str) + "\n")

    outcomes = _run(words, rig, wanted, note, began)
    note(outcomes)
    _table(outcomes, document)
    return 0 if all(outcome.state in FINE for outcome in outcomes) else 1


def _words(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--dry", action="store_true", help="tiny shapes, on a CPU too")
    parser.add_argument("--small", action="store_true", help="tiny shapes on a GPU")
    parser.add_argument("--only", default="", help="names of sections, with commas between")
    parser.add_argument(
        "--json",
        type=Path,
        default=RESULTS / "gpu.json",
        metavar="PATH",
        help="where the figures go, any path; %(default)s by default",
    )
    parser.add_argument("--in-process", action="store_true", help="no process of their own")
    parser.add_argument("--told", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)
    parser.add_argument("--table", default="bench.gpu_suite", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _rig(*, small: bool, on_gpu: bool) -> "Rig":
    import torch

    from bench.gpu.section import Rig

    torch.manual_seed(0)
    if on_gpu:
        return Rig(torch.device("cuda", 0), torch.bfloat16, small)
    return Rig(torch.device("cpu"), torch.float32, small)


def _run(
    words: argparse.Namespace,
    rig: "Rig",
    wanted: "Sequence[Section]",
    note: "Callable[[list[Outcome]], None]",
    began: float,
) -> "list[Outcome]":
    from bench.gpu.section import run_section
    from bench.gpu.supervise import Supervisor

    if words.in_process:
        return [run_section(rig, section) for section in wanted]
    flags = ["--dry"] * words.dry + ["--small"] * words.small + ["--table", words.table]

    def command(names: Sequence[str], told: Path, until: float) -> list[str]:
        suite = [sys.executable, "-m", "bench.gpu_suite", "--told", str(told), *flags]
        return [*suite, "--until", str(until - LAST_WORDS), "--only", ",".join(names)]

    end = began + (TOTAL_SECONDS if rig.on_gpu else TOTAL_OFF_GPU)
    return Supervisor(wanted, command, end, rig.slack, note).run()


def _machine(on_gpu: bool) -> dict[str, Any]:
    """Without a context on the device: this process must outlive whatever happens there."""
    from fader_server.bench.machine import machine_facts

    facts = machine_facts() | {"versions": {name: _version(name) for name in PACKAGES}}
    if on_gpu:
        import torch

        facts["gpu"] = {"cuda": torch.version.cuda} | _smi(
            name="name", driver="driver_version", memory="memory.total", capability="compute_cap"
        )
    return facts


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _smi(**queries: str) -> dict[str, str]:
    """What nvidia-smi says of the first device; empty where it does not."""
    wanted = f"--query-gpu={','.join(queries.values())}"
    command = ["nvidia-smi", wanted, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.strip().split("\n")[0].split(", ")
    return dict(zip(queries, values, strict=True)) if len(values) == len(queries) else {}


def _table(outcomes: "Sequence[Outcome]", document: dict[str, Any]) -> None:
    gpu = document["machine"].get("gpu", {}).get("name", "no GPU, interpreted")
    print(f"\n{gpu}, {document['seconds']:.0f} s in all")
    for outcome in outcomes:
        told = f": {outcome.error}" if outcome.error else ""
        print(f"{outcome.name:18} {outcome.state:11} {outcome.seconds:6.1f} s{told}")
        for line in outcome.lines:
            print(f"    {line}")


if __name__ == "__main__":
    sys.exit(main())
