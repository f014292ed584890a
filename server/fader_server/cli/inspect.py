"""`fader inspect`: an adapter's health report, offline."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fader_server.cli.offline import ROOTS_HELP, Dtype, find_adapter, open_model
from fader_server.errors import ModelUnsupported

if TYPE_CHECKING:
    from fader_adapters.report import Health


def inspect(
    adapter: Annotated[str, typer.Argument(help="A folder, or a name under a root.")],
    base: Annotated[
        str | None,
        typer.Option(help="Check it against this base: a folder or a Hub id.", metavar="MODEL"),
    ] = None,
    adapter_dir: Annotated[list[Path] | None, typer.Option(help=ROOTS_HELP)] = None,
    dtype: Annotated[Dtype, typer.Option(help="What the weights are held in.")] = Dtype.BFLOAT16,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
) -> None:
    """What an adapter holds and, with --base, whether it fits and how much it changes.

    Everything is checked as a server would; what a server refuses is refused here, exit code 2.
    Without --base, copies of the base's weights beside the adapter are named, not compared.
    """
    import torch

    from fader_adapters.inspection import Inspector
    from fader_adapters.report import health_facts
    from fader_adapters.source import LocalSources
    from fader_adapters.weightspace.alone import own_linears
    from fader_adapters.weightspace.base import open_base

    raw = LocalSources(()).fetch_trusted(find_adapter(adapter, adapter_dir or ()))
    kind = getattr(torch, dtype.value)
    if base is None:
        inspector = Inspector(own_linears(raw), dtype=kind, trust_copies=True)
    else:
        opened = open_base(open_model(base))
        inspector = Inspector(opened.spec, dtype=kind, weights=opened)
    parsed = inspector.read(raw)
    health = inspector.health(parsed)
    facts = {"adapter": adapter, "version": parsed.spec.version, **health_facts(health)}
    if base is None:
        facts |= {"total_modules": None, "base_match": None, "largest_relative_norm": None}
        facts |= {"copies_not_compared": list(parsed.report.copies_not_compared)}
    text = _text(base, parsed.report.invocation)
    facts["invocation_text"] = text
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    _show(Console(highlight=False), parsed.spec.version, health, against=base, invocation=text)


def _text(base: str | None, invocation: tuple[int, ...]) -> str | None:
    """What tokens stand for in a base; None: there are none, or it is not known."""
    if base is None or not invocation:
        return None
    from fader_server.text.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.load(str(open_model(base)), max_model_len=len(invocation))
    except ModelUnsupported:  # it needs none to be looked at
        return None
    return tokenizer.decode(invocation, special=True)


def _show(
    console: Console,
    version: str,
    health: "Health",
    *,
    against: str | None,
    invocation: str | None,
) -> None:
    report = health.report
    total = f" of {report.total} linears of the base" if against else " linears"
    kinds = ", ".join(("LoRA", *report.kinds))
    facts = {
        "version": version,
        "kind": f"{kinds}{', rsLoRA' if report.rslora else ''}",
        "adapts": f"{report.matched}{total}",
        "rank": _numbers(report.ranks),
        "effective scale": _numbers(report.scales),
        "dtype": f"{', '.join(report.source_dtypes)} in the file, {health.dtype} in memory",
        "bytes": f"{health.nbytes:,} in memory",
        "‖ΔW‖": f"{report.delta_norm:.4g}{_ratio(health.relative_norm, ' of ‖W‖')}",
        "base": health.match.told if against else "not looked at: name it with --base",
    }
    if report.invocation:
        told = "" if invocation is None else f": {invocation!r}"
        tokens = ", ".join(map(str, report.invocation))
        facts["activated by"] = f"tokens {tokens}{told}, where a prompt has them"
    if report.unmatched and against:
        facts["not in the base"] = f"{', '.join(report.unmatched)}: named as to be trained"
    if report.copies:
        facts["not trained"] = f"{', '.join(report.copies)}: the base's own"
    if against:
        facts["fingerprint"] = health.match.fingerprint
    if report.copies_not_compared:
        facts["not compared"] = (
            f"{', '.join(report.copies_not_compared)}: must be the base's own; name it with --base"
        )
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    console.print(table, markup=False)
    sites = Table("linear", "count", "rank", "‖ΔW‖", *(["‖ΔW‖/‖W‖"] if against else []))
    for kind in health.kinds:
        ratio = [_ratio(kind.relative_norm, "").strip()] if against else []
        sites.add_row(
            kind.kind, str(kind.modules), _numbers(kind.ranks), f"{kind.delta_norm:.4g}", *ratio
        )
    console.print(sites, markup=False)


def _numbers(values: tuple[int, ...] | tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _ratio(value: float | None, unit: str) -> str:
    return "" if value is None else f" {value:.3%}{unit}"
