"""`fader bench swap`: flags in, table and exit code out."""

import asyncio
from dataclasses import asdict
from typing import Annotated

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
from fader_server.bench.swap import SwapOptions, run_swap


def swap(
    sources: Annotated[str, typer.Option(help="Two or more, with commas between.")],
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
    begun = begin()
    options = checked(
        lambda: SwapOptions(
            url=url,
            sources=names_in(sources),
            streams=streams,
            adapters=names_in(adapters),
            rounds=rounds,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            seed=seed,
            api_key=api_key,
            vocab=vocab,
        )
    )
    result = checked(lambda: asyncio.run(run_swap(options)))
    if not result.ok:
        failed(f"{fault.kind}: {model}: {fault.detail}" for model, fault in result.faults)
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
    write_json(
        json_file,
        begun,
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
