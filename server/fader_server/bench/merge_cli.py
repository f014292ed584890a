"""`fader bench merge`: flags in, table and exit code out. Knows no load and no statistics."""

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fader_server.bench.console import Json, Key, Url, begin, checked, failed, write_json
from fader_server.bench.merge import run
from fader_server.bench.merge_result import BARS, Options, Result


def merge(
    url: Url = "http://127.0.0.1:8000",
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
    admin_key: Key = None,
    json_file: Json = None,
) -> None:
    """Measure the merged lane of a running server: its speed, its neighbours, its making.

    Base, lane and delta lane in turn, rounds forwards and backwards. Exit code 1 and no figure when
    a request failed or an answer changed that should not have.
    """
    begun = begin()
    options = checked(
        lambda: Options(
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
    )
    result = checked(lambda: asyncio.run(run(options)))
    if result.ok:
        show(result, Console())
    write_json(json_file, begun, as_json(options, result))
    if not result.ok:
        failed(result.faults)


def as_json(options: Options, result: Result) -> dict[str, Any]:
    """What was asked, found and measured; figures only if the run had no fault."""
    settings = asdict(options)
    settings.pop("api_key")
    document: dict[str, Any] = {
        "format": "fader-bench-merge/1",
        "ok": result.ok,
        "options": settings,
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
