"""`fader bench swap` and `fader bench scale`: flags in, tables and exit code out."""

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

from fader_server.bench.client import Fault
from fader_server.bench.machine import machine_facts, safe_command
from fader_server.bench.report import as_json
from fader_server.bench.scale import ScaleOptions, ScaleResult, run_scale
from fader_server.bench.serve import Options
from fader_server.bench.stats import Summary
from fader_server.bench.swap import SwapOptions, SwapResult, run_swap
from fader_server.errors import ConfigInvalid

Url = Annotated[str, typer.Option(help="The server's root.")]
Key = Annotated[
    str | None,
    typer.Option(envvar="FADER_ADMIN_KEY", help="Bearer token that may load adapters."),
]
Sources = Annotated[str, typer.Option(help="Two or more, with commas between.")]
Vocab = Annotated[int | None, typer.Option(help="Vocabulary size, where the server is silent.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the whole result here.")]


def swap(
    sources: Sources,
    url: Url = "http://127.0.0.1:8000",
    adapters: Annotated[str, typer.Option(help="Of the streams; default: the base.")] = "",
    streams: Annotated[int, typer.Option(help="Answers under way at a time.")] = 8,
    rounds: Annotated[int, typer.Option(help="Each quiet once and swapping once.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(help="Exact prompt length.")] = 64,
    output_tokens: Annotated[int, typer.Option(help="Exact output length.")] = 160,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    api_key: Key = None,
    vocab: Vocab = None,
    json_file: Json = None,
) -> None:
    """Time between tokens while one name is swapped without a pause, against quiet.

    Exit code 1 and no figure when an answer changed or the swapped name answered as another.
    """
    started = _now()
    options = _checked(
        lambda: SwapOptions(
            url=url,
            sources=_names(sources),
            streams=streams,
            adapters=_names(adapters),
            rounds=rounds,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            seed=seed,
            api_key=api_key,
            vocab=vocab,
        )
    )
    result: SwapResult = _checked(lambda: asyncio.run(run_swap(options)))
    if not result.ok:
        _failed(result.faults)
    assert result.pooled is not None
    table = Table("between tokens, ms", "p50", "p99", "longest")
    for name, summary in zip(("quiet", "swapping"), result.pooled, strict=True):
        table.add_row(name, *(f"{v:.2f}" for v in (summary.p50, summary.p99, summary.high)))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"p99 {result.p99_ratio:.3f} × quiet, longest gap {result.worst_gap:.2f} × median"
    )
    settings = asdict(options)
    settings.pop("api_key")
    _write(
        json_file,
        started,
        {
            "format": "fader-bench-swap/1",
            "options": settings,
            "p99_ratio": result.p99_ratio,
            "longest_gap_over_median": result.worst_gap,
            "quiet_longest_over_median": result.pooled[0].high / result.pooled[0].p50,
            "gaps_ms": dict(zip(("quiet", "swapping"), map(asdict, result.pooled), strict=True)),
            "largest_adapter": asdict(result.adapter) if result.adapter else None,
            "rounds": [{"quiet": asdict(q), "swapping": asdict(s)} for q, s in result.rounds],
            "server": {"base": result.served.base, **result.served.facts},
        },
    )


def scale(
    names: Annotated[Path, typer.Option(help="A folder whose folders are the server's adapters.")],
    sources: Sources,
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
    """Many adapters, few places: tokens a second against one adapter, and first tokens by tier.

    Exit code 1 and no figure when `bench serve`'s checks fail.
    """
    started = _now()
    folders = sorted(path.name for path in names.iterdir() if path.is_dir())
    options = _checked(
        lambda: ScaleOptions(
            url=url,
            names=tuple(folders),
            sources=_names(sources),
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
    result: ScaleResult = _checked(lambda: asyncio.run(run_scale(options)))
    if result.throughput is None:
        _failed(result.load.faults)
    table = Table("ms", "p50", "p99")
    rows = {f"first token, {tier} tier": s for tier, s in result.first_token.items()}
    rows |= {
        "load (PUT)": result.load_alone,
        "PUT to first token": result.put_to_first_token,
        f"look up 1 of {result.known}": result.lookup,
        "look up one and the same": result.lookup_few,
    }
    for name, summary in rows.items():
        table.add_row(name, f"{summary.p50:.2f}", f"{summary.p99:.2f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{result.known} adapters, zipf {exponent:g}: {result.throughput:.1%} of the tokens/s of "
        f"one; tiers {result.tiers}"
    )
    _write(json_file, started, _scale_facts(options, result, started))


def _scale_facts(options: ScaleOptions, result: ScaleResult, started: str) -> dict[str, Any]:
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
    load = as_json(serving, result.load, client={}, command=[], started=started)
    load["server"].pop("adapters")
    load["server"].pop("fingerprints")
    timed: dict[str, Summary] = {
        "lookup": result.lookup,
        "lookup_of_one": result.lookup_few,
        "load": result.load_alone,
        "put_to_first_token": result.put_to_first_token,
    }
    return {
        "format": "fader-bench-scale/1",
        "known": result.known,
        "exponent": options.exponent,
        "tokens_per_s_over_one_adapter": result.throughput,
        "tiers_after": result.tiers,
        "first_token_ms": {tier: asdict(s) for tier, s in result.first_token.items()},
        "ms": {name: asdict(summary) for name, summary in timed.items()},
        "load": {key: load[key] for key in ("options", "server", "parity", "notes", "scenarios")},
    }


def _checked(work: Any) -> Any:  # noqa: ANN401 - what the work gives
    """The result of `work`, or one line and exit code 2 for what the user can mend."""
    try:
        return work()
    except ConfigInvalid as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(2) from None


def _failed(faults: list[tuple[str, Fault]]) -> None:
    errors = Console(stderr=True)
    errors.print("FAILED, no figures", style="bold red")
    for model, fault in faults[:8]:
        errors.print(f"  {fault.kind}: {model}: {fault.detail}", style="red", markup=False)
    raise typer.Exit(1)


def _write(path: Path | None, started: str, document: dict[str, Any]) -> None:
    if path is not None:
        command = ["fader", *safe_command(sys.argv[1:])]
        facts = {"started_at": started, "command": command, "client": machine_facts()}
        path.write_text(json.dumps(facts | document, indent=1) + "\n")


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
