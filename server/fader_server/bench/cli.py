"""`fader bench serve`: flags in, exit code out. Knows no load and no statistics."""

import asyncio
from typing import Annotated

import typer
from rich.console import Console

from fader_server.bench.console import Json, Url, Vocab, begin, checked, names_in, write_json
from fader_server.bench.popularity import parse_popularity
from fader_server.bench.report import as_json, show
from fader_server.bench.serve import Options, run

bench_app = typer.Typer(
    help="Measure a running server, or this machine's kernels.", rich_markup_mode=None
)


@bench_app.callback()
def bench() -> None:
    """Measure a running server, or this machine's kernels."""


@bench_app.command()
def serve(
    url: Url = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="The base's name; default: as listed.")] = None,
    adapters: Annotated[str, typer.Option(help="Names with commas between, or 'all'.")] = "",
    popularity: Annotated[
        str | None, typer.Option(help="base, identical, distinct, uniform, zipf or zipf:S.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(help="Popularities with commas between, interleaved; ratios to the first."),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Closed loop: requests in flight (default 1).")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Open loop: Poisson arrivals a second.")
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests a repeat.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(help="Exact prompt length.")] = 128,
    output_tokens: Annotated[int, typer.Option(help="Exact output length.")] = 64,
    warmup: Annotated[int, typer.Option(help="Least number of unmeasured requests.")] = 8,
    repeat: Annotated[
        int | None, typer.Option(help="Measured repeats (default 1, 3 with --compare).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals, popularity and prompts.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds a request may take.")] = 600.0,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="FADER_API_KEY", help="Bearer token; the first, if commas follow."),
    ] = None,
    vocab: Vocab = None,
    json_file: Json = None,
    ignore_base: Annotated[
        bool, typer.Option(help="Never ask the base, not even for parity.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(help="Above 0: drawn, by seeds of the prompts.")
    ] = 0.0,
) -> None:
    """Load a server over HTTP and report latencies and throughput.

    Exit code 1 and no figure when any request failed, came out at another length than asked, ended
    without [DONE], or when an adapter's answer amid the load is not its answer alone.
    """
    if compare and popularity:
        raise typer.BadParameter("give either --popularity or --compare")
    kinds = compare or popularity or ("identical" if adapters else "base")
    begun = begin()
    options = checked(
        lambda: Options(
            url=url,
            model=model,
            adapters=None if adapters.strip() == "all" else names_in(adapters),
            scenarios=tuple(parse_popularity(kind) for kind in kinds.split(",")),
            concurrency=1 if concurrency is None and rate is None else concurrency,
            rate=rate,
            requests=requests,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            warmup=warmup,
            repeats=repeat or (3 if compare else 1),
            seed=seed,
            timeout=timeout,
            api_key=api_key.split(",")[0] if api_key else None,
            vocab=vocab,
            ignore_base=ignore_base,
            temperature=temperature,
        )
    )
    result = checked(lambda: asyncio.run(run(options)))
    show(result, Console(stderr=not result.ok))
    write_json(json_file, begun, as_json(options, result))
    if not result.ok:
        raise typer.Exit(1)
