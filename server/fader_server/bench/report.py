"""A result as JSON and as a table. Knows no load; prints no figure of a failed run."""

from collections import Counter
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from fader_server.bench.figures import Repeat, across, ratios
from fader_server.bench.serve import Options, Result
from fader_server.bench.stats import Spread

_LABELS = {
    "output_tokens_per_s": "output tokens/s",
    "requests_per_s": "requests/s",
    "ttft_ms": "TTFT, ms",
    "inter_token_ms": "inter-token, ms",
    "tpot_ms": "TPOT, ms",
    "latency_ms": "latency, ms",
}


def as_json(options: Options, result: Result) -> dict[str, Any]:
    """What was asked, found and measured; figures only if the run had no fault."""
    settings = asdict(options)
    settings.pop("api_key")
    settings["scenarios"] = [str(scenario) for scenario in options.scenarios]
    document: dict[str, Any] = {
        "format": "fader-bench-serve/1",
        "ok": result.ok,
        "options": settings,
        "nonce": result.nonce,
        "server": {
            "base": result.served.base,
            "adapters": list(result.served.adapters),
            "vocabulary": len(result.served.vocabulary),
            "vocabulary_source": result.served.vocabulary_source,
            "fingerprints": result.fingerprints,
            **result.served.facts,
        },
        "parity": {"models": result.parity_models, "like_base": list(result.like_base)},
        "faults": [{"model": m, "kind": f.kind, "detail": f.detail} for m, f in result.faults],
    }
    if result.ok:
        document["notes"] = notes(result)
        document["scenarios"] = {
            name: {
                "across_repeats": _plain(across(repeats)),
                "repeats": [asdict(repeat) for repeat in repeats],
            }
            for name, repeats in result.repeats.items()
        }
        document["ratios"] = {
            f"{name}/{_first(result)}": _plain(ratios(repeats, result.repeats[_first(result)]))
            for name, repeats in list(result.repeats.items())[1:]
        }
    return document


def notes(result: Result) -> list[str]:
    """What a reader should know before quoting a figure."""
    said = []
    if result.like_base:
        said.append(
            f"{len(result.like_base)} adapter(s) answered the parity prompt exactly as the base: "
            f"{', '.join(result.like_base[:8])}"
        )
    repeats = [repeat for runs in result.repeats.values() for repeat in runs]
    busiest = max(repeat.client_busy for repeat in repeats)
    if busiest > 0.5:
        said.append(f"the client used {busiest:.0%} of a core: it may be part of what was measured")
    coarsest = max(repeat.tokens_per_event for repeat in repeats)
    if coarsest > 1.05:
        said.append(
            f"up to {coarsest:.2f} tokens came in one event: inter-token times are of events"
        )
    if len(next(iter(result.repeats.values()))) < 3:
        said.append("fewer than 3 repeats: the spread says little")
    return said


def show(result: Result, console: Console) -> None:
    """Print the table of a good run, or the reasons of a failed one and no figure at all."""
    if not result.ok:
        _show_faults(result, console)
        return
    console.print(
        f"parity: {result.parity_models} model(s) gave the same text alone and amid the load",
        style="green",
    )
    for name, repeats in result.repeats.items():
        console.print(f"{name}: medians of {len(repeats)} repeat(s)", style="bold", markup=False)
        console.print(_figures_table(repeats))
    first = _first(result)
    for name, repeats in list(result.repeats.items())[1:]:
        console.print(f"{name} / {first}: ratios of medians", style="bold", markup=False)
        console.print(_ratio_table(ratios(repeats, result.repeats[first])))
    for note in notes(result):
        console.print(f"note: {note}", style="yellow", markup=False)


def _show_faults(result: Result, console: Console) -> None:
    counts = Counter(fault.kind for _, fault in result.faults)
    summary = ", ".join(f"{kind} × {count}" for kind, count in counts.most_common())
    console.print(f"FAILED, no figures: {summary}", style="bold red", markup=False)
    for kind in counts:
        model, fault = next(pair for pair in result.faults if pair[1].kind == kind)
        line = f"  {kind}: {model}: {fault.detail}"
        console.print(line, style="red", markup=False, soft_wrap=True)


def _figures_table(repeats: list[Repeat]) -> Table:
    table = _table("figure", "p50", "least … greatest", "p95", "p99")
    figures = across(repeats)
    for key, label in _LABELS.items():
        if key in figures:
            rate = figures[key]
            table.add_row(label, f"{rate.median:.1f}", _ends(rate, digits=1), "", "")
        elif f"{key}_p50" in figures:
            p50, p95, p99 = (figures[f"{key}_{p}"] for p in ("p50", "p95", "p99"))
            tail = (f"{p95.median:.2f}", f"{p99.median:.2f}")
            table.add_row(label, f"{p50.median:.2f}", _ends(p50, digits=2), *tail)
    return table


def _ratio_table(figures: dict[str, Spread]) -> Table:
    table = _table("figure", "ratio", "least … greatest")
    for key, label in _LABELS.items():
        ratio = figures.get(key) or figures.get(f"{key}_p50")
        if ratio is not None:
            table.add_row(label, f"{ratio.median:.3f}", _ends(ratio, digits=3))
    return table


def _table(first: str, *columns: str) -> Table:
    table = Table()
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _ends(value: Spread, *, digits: int) -> str:
    return f"{value.low:.{digits}f} … {value.high:.{digits}f}"


def _first(result: Result) -> str:
    return next(iter(result.repeats))


def _plain(figures: dict[str, Spread]) -> dict[str, dict[str, float]]:
    return {name: asdict(value) for name, value in figures.items()}
