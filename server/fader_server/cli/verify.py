"""`fader verify`: Fader beside PEFT on this machine, with the user's own base and adapters."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fader_server.cli.offline import ROOTS_HELP, Dtype, find_adapter, open_model
from fader_server.errors import ConfigInvalid

if TYPE_CHECKING:
    from fader_server.verification import Verified


def verify(
    adapters: Annotated[
        list[str],
        typer.Argument(help="Folders, or names under a root.", metavar="ADAPTER..."),
    ],
    base: Annotated[str, typer.Option(help="A local folder or a Hub id.", metavar="MODEL")],
    adapter_dir: Annotated[list[Path] | None, typer.Option(help=ROOTS_HELP)] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Instead of the built-in ones; several times.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens after each prompt.")] = 16,
    dtype: Annotated[
        Dtype, typer.Option(help="float32 is sharpest: its rounding hides nothing.")
    ] = Dtype.FLOAT32,
    as_json: Annotated[bool, typer.Option("--json", help="The findings as JSON.")] = False,
) -> None:
    """Compare Fader's logprobs with those of transformers and PEFT on the same NF4 base.

    Exit code 1 when they differ by more than rounding explains. Runs on the CPU; PEFT's copy of the
    base is not quantised in memory and needs 4 bytes a weight in float32. Needs 'fader[verify]'.
    """
    import torch

    from fader_server import verification
    from fader_server.peft_side import require_peft

    require_peft()
    folders = {f"a{i}": find_adapter(name, adapter_dir or ()) for i, name in enumerate(adapters)}
    if len({folder.resolve() for folder in folders.values()}) < len(folders):
        raise ConfigInvalid("an adapter was given twice")
    found = verification.verify(
        str(open_model(base)),
        folders,
        dtype=getattr(torch, dtype.value),
        prompts=prompt or verification.PROMPTS,
        tokens=tokens,
    )
    given = dict(zip(folders, adapters, strict=True))
    if as_json:
        rows = [{**asdict(f), "adapter": f.adapter and given[f.adapter]} for f in found.findings]
        facts = {"ok": found.ok, "dtype": found.dtype, "threshold": found.threshold}
        typer.echo(json.dumps({**facts, "findings": rows}, indent=1))
    else:
        _show(Console(highlight=False), found, given)
    if not found.ok:
        raise typer.Exit(1)


def _show(console: Console, found: "Verified", given: dict[str, str]) -> None:
    table = Table("adapter", "largest |Δ logprob|", "positions", "greedy", "its effect", "verdict")
    for one in found.findings:
        right = one.difference <= found.threshold
        table.add_row(
            Path(given[one.adapter]).name if one.adapter else "none (the base)",
            f"{one.difference:.3g}",
            str(one.positions),
            f"{one.same_tokens}/{one.tokens}",
            f"{one.effect:.3g}" if one.adapter else "",
            "[green]same[/green]" if right else "[bold red]DIFFERS[/bold red]",
        )
    console.print(table)
    told = "equal to PEFT" if found.ok else "NOT equal to PEFT"
    console.print(
        f"{told}: {found.dtype} explains differences up to {found.threshold:.3g}",
        style="green" if found.ok else "bold red",
    )
    faint = [given[f.adapter] for f in found.findings if f.adapter and f.effect < found.threshold]
    if faint:
        console.print(
            f"note: these prompts do not feel {', '.join(faint)}; give others with --prompt",
            style="yellow",
            markup=False,
        )
