"""`fader bench merge`: flags in, table and exit code out. Knows no load and no statistics."""

import asyncio
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fader_server.bench.machine import machine_facts, safe_command
from fader_server.bench.merge import run
from fader_server.bench.merge_result import BARS, Options, Result
from fader_server.errors import ConfigInvalid


def merge(
    url: Annotated[str, typer.Option(help="The server's root.")] = "http://127.0.0.1:8000",
    adapter: Annotated[
        str | None, typer.Option(help="To merge; default: the first listed.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="nf4 or bf16.")] = "nf4",
    requests: Annotated[int, typer.Option(help="Requests of each measured load.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(help="Exact prompt length.")] = 32,
    output_tokens: Annotated[int, typer.Option(help="Exact output length.")] = 64,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = 1,
    repeat: Annotated[int, typer.Option(help="Rounds of all loads.")] = 3,
    busy_merges: Annotated[
        int, typer.Option(help="Rounds that end with a merge while streams run.")
    ] = 3,
    steady: Annotated[float, typer.Option(help="Seconds of streams before each merge.")] = 3.0,
    idle: Annotated[bool, typer.Option(help="Only one merge, without streams.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds a request may take.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Of prompts.")] = 0,
    admin_key: Annotated[
        str | None, typer.Option(envvar="FADER_ADMIN_KEY", help="Bearer token of both kinds.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the whole result here.")
    ] = None,
) -> None:
    """Measure the merged lane of a running server: its speed, its neighbours, its making.

    Base, lane and delta lane in turn, rounds forwards and backwards. Exit code 1 and no figure when
    a request failed or an answer changed that should not have.
    """
    console, errors = Console(), Console(stderr=True)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        options = Options(
            url=url,
            adapter=adapter,
            dtype=dtype,
            requests=requests,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            concurrency=concurrency,
            repeats=repeat,
            busy_merges=busy_merges,
            steady_seconds=steady,
            idle=idle,
            timeout=timeout,
            seed=seed,
            api_key=admin_key,
        )
        facts = machine_facts()
        result = asyncio.run(run(options))
    except ConfigInvalid as error:
        errors.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(2) from None
    if result.ok:
        show(result, console)
    else:
        errors.print("FAILED, no figures: " + "; ".join(result.faults[:4]), style="bold red")
    if json_file is not None:
        command = ["fader", *safe_command(sys.argv[1:])]
        document = as_json(options, result, client=facts, command=command, started=started)
        json_file.write_text(json.dumps(document, indent=1) + "\n")
    if not result.ok:
        raise typer.Exit(1)


def as_json(
    options: Options, result: Result, *, client: dict[str, Any], command: list[str], started: str
) -> dict[str, Any]:
    """Everything a reader needs to judge or repeat the run; figures only if it had no fault."""
    settings = asdict(options)
    settings.pop("api_key")
    document: dict[str, Any] = {
        "format": "fader-bench-merge/1",
        "ok": result.ok,
        "started_at": started,
        "command": command,
        "options": settings,
        "client": client,
        "server": {"base": result.served.base, **result.served.facts},
        "merged": result.adapter,
        "delta": result.other,
        "faults": result.faults,
    }
    if result.ok:
        document |= {
            "bars": BARS,
            "ratios": {name: asdict(value) for name, value in result.ratios().items()},
            "rounds": [{k: asdict(v) for k, v in found.items()} for found in result.rounds],
            "inter_token_ms": [
                {"without": asdict(before), "while merging": asdict(during)}
                for before, during in result.gaps
            ],
            "merges": [asdict(merge) for merge in result.merges],
            "report": result.report,
        }
    return document


def show(result: Result, console: Console) -> None:
    """The ratios with their bars, and what a merge took."""
    console.print("parity: others answered alike alone, beside, during and after", style="green")
    table = Table()
    for column in ("ratio", "median", "least … greatest", "bar"):
        table.add_column(column, justify="left" if column == "ratio" else "right", no_wrap=True)
    for name, value in result.ratios().items():
        bar = f"{BARS[name]:.2f}" if name in BARS else ""
        ends = f"{value.low:.3f} … {value.high:.3f}"
        table.add_row(name.replace("_", " "), f"{value.median:.3f}", ends, bar)
    if table.row_count:
        console.print(table)
    for busy in (False, True):
        told = [merge for merge in result.merges if merge.busy is busy]
        if told:
            seconds = sorted(merge.seconds for merge in told)[len(told) // 2]
            when = "while streams ran" if busy else "alone"
            console.print(f"merge {when}: {seconds:.2f} s, {told[0].bytes / 2**20:.1f} MiB")
