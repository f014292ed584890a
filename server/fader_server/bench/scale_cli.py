"""`fader bench scale`: flags in, tables and exit code out."""

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fader_server.bench.console import (
    Json,
    Key,
    Url,
    Vocab,
    begin,
    checked,
    failed,
    names_in,
    write_json,
)
from fader_server.bench.growth import Growth, GrowthOptions, run_growth
from fader_server.bench.report import as_json
from fader_server.bench.scale import ScaleOptions, ScaleResult, run_scale
from fader_server.bench.serve import Options
from fader_server.bench.stats import Summary
from fader_server.errors import ConfigInvalid


def scale(
    names: Annotated[
        Path | None, typer.Option(help="A folder whose folders are the server's adapters.")
    ] = None,
    sources: Annotated[str, typer.Option(help="Two or more, with commas between.")] = "",
    register: Annotated[
        Path | None,
        typer.Option(help="A folder inside a root of the server: register what is in it, timed."),
    ] = None,
    url: Url = "http://127.0.0.1:8000",
    exponent: Annotated[float, typer.Option(help="Of the zipf law.")] = 1.0,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = 8,
    requests: Annotated[int, typer.Option(help="Requests a repeat.")] = 64,
    repeat: Annotated[int, typer.Option(help="Measured repeats.")] = 3,
    prompt_tokens: Annotated[int, typer.Option(help="Exact prompt length.")] = 64,
    output_tokens: Annotated[int, typer.Option(help="Exact output length.")] = 32,
    seed: Annotated[int, typer.Option(help="Of popularity and prompts.")] = 0,
    api_key: Key = None,
    vocab: Vocab = None,
    json_file: Json = None,
) -> None:
    """Many adapters: what one more costs (--register), and serving them from few places (--names).

    The first: the time of a PUT and of a GET against the number registered. The second: tokens a
    second against one adapter, first tokens by tier, PUT to first token. Exit code 1 and no figure
    when `bench serve`'s checks fail.
    """
    begun = begin()
    checked(lambda: _check(names, sources, register))
    document: dict[str, Any] = {"format": "fader-bench-scale/2"}
    if register is not None:
        inside = tuple(f"{register.name}/{name}" for name in _folders(register))
        growing = checked(lambda: GrowthOptions(url=url, sources=inside, api_key=api_key))
        growth = checked(lambda: asyncio.run(run_growth(growing)))
        _show_growth(growth)
        document["growth"] = _growth_facts(growth)
    if names is not None:
        options = checked(
            lambda: ScaleOptions(
                url=url,
                names=_folders(names),
                sources=names_in(sources),
                exponent=exponent,
                concurrency=concurrency,
                requests=requests,
                repeats=repeat,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                seed=seed,
                api_key=api_key,
                vocab=vocab,
            )
        )
        result = checked(lambda: asyncio.run(run_scale(options)))
        if result.throughput is None:
            failed(f"{fault.kind}: {model}: {fault.detail}" for model, fault in result.load.faults)
        _show_scale(options, result)
        document |= _scale_facts(options, result)
    write_json(json_file, begun, document)


def _check(names: Path | None, sources: str, register: Path | None) -> None:
    if names is None and register is None:
        raise ConfigInvalid("give --names to serve many adapters, --register to register them")
    if names is not None and not sources:
        raise ConfigInvalid("--names needs --sources, for the time from PUT to first token")
    for folder in (names, register):
        if folder is not None and not folder.is_dir():
            raise ConfigInvalid(f"{folder}: no such folder")


def _folders(path: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))


def _show_growth(growth: Growth) -> None:
    table = Table("registered", "PUT, ms: least", "p50", "p99", "GET, ms: least", "p50", "p99")
    for point in growth.points:
        both = (point.register, point.lookup)
        cells = [f"{value:.2f}" for one in both for value in (one.low, one.p50, one.p99)]
        table.add_row(str(point.registered), *cells)
    console = Console(highlight=False)
    console.print(table)
    console.print(f"last to first: PUT {growth.register:.2f} ×, GET {growth.lookup:.2f} ×")


def _growth_facts(growth: Growth) -> dict[str, Any]:
    return {
        "points": [asdict(point) for point in growth.points],
        "register_last_over_first": growth.register,
        "lookup_last_over_first": growth.lookup,
    }


def _show_scale(options: ScaleOptions, result: ScaleResult) -> None:
    table = Table("ms", "p50", "p99")
    rows = {f"first token, {tier} tier": s for tier, s in result.first_token.items()}
    rows |= {
        f"look up 1 of {result.known}": result.lookup,
        "look up one and the same": result.lookup_few,
    }
    for tier, one in result.puts.items():
        rows[f"PUT, rank {result.rank}, content in the {tier} tier"] = one.put
        rows[f"PUT to first token, from the {tier} tier"] = one.to_first_token
    for name, summary in rows.items():
        table.add_row(name, f"{summary.p50:.2f}", f"{summary.p99:.2f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{result.known} adapters, zipf {options.exponent:g}: {result.throughput:.1%} of the "
        f"tokens/s of one; tiers {result.tiers}"
    )


def _scale_facts(options: ScaleOptions, result: ScaleResult) -> dict[str, Any]:
    serving = Options(
        url=options.url,
        scenarios=(),
        concurrency=options.concurrency,
        requests=options.requests,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        repeats=options.repeats,
        seed=options.seed,
    )
    load = as_json(serving, result.load)
    load["server"].pop("adapters")
    load["server"].pop("fingerprints")
    timed: dict[str, Summary] = {
        "lookup": result.lookup,
        "lookup_of_one": result.lookup_few,
    }
    return {
        "known": result.known,
        "exponent": options.exponent,
        "tokens_per_s_over_one_adapter": result.throughput,
        "tiers_after": result.tiers,
        "first_token_ms": {tier: asdict(s) for tier, s in result.first_token.items()},
        "puts_ms": {tier: asdict(one) for tier, one in result.puts.items()},
        "rank": result.rank,
        "ms": {name: asdict(summary) for name, summary in timed.items()},
        "load": {key: load[key] for key in ("options", "server", "parity", "notes", "scenarios")},
    }
