"""`fader bench kernels`: this machine's native kernels, proved right and then timed."""

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fader_server.bench.machine import machine_facts, safe_command


def kernels(
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: every core.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Timed calls of each method.")] = 30,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the whole result here.")
    ] = None,
) -> None:
    """Time the native CPU kernels beside torch, bitsandbytes and the machine's own limits.

    Parity first: exit code 1 and no figure when a kernel is wrong on this machine. All methods of
    a row are called in turn, the weights streamed from memory.
    """
    import torch

    from fader_adapters.kernels.measure import report
    from fader_adapters.kernels.measure.parity import ParityFailed

    if threads is not None:
        torch.set_num_threads(threads)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    facts = machine_facts()
    try:
        result = report.run(repeats=repeats)
    except ParityFailed as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{facts['cpu']}, {facts['cores_usable']} cores, {facts['system']}")
    for line in report.lines(result):
        typer.echo(line)
    if json_file is not None:
        document = {
            "quiet": result.quiet,
            "command": ["fader", *safe_command(sys.argv[1:])],
            "started": started,
            "machine": facts,
        }
        json_file.write_text(json.dumps(document | asdict(result), indent=1) + "\n")
