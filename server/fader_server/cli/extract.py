"""`fader extract`: what a full fine-tune changed, as an adapter."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fader_server.cli.offline import open_model, watched

if TYPE_CHECKING:
    from fader_adapters.targets import Targets

_SHOWN = 8


def extract(
    finetune: Annotated[
        str, typer.Argument(help="The fine-tuned model: a local folder or a Hub id.")
    ],
    base: Annotated[str, typer.Option(help="What it was tuned from.", metavar="MODEL")],
    rank: Annotated[int, typer.Option(help="Largest rank of a linear.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    targets: Annotated[
        str | None, typer.Option(help="Names of linears, with commas. Default: all of them.")
    ] = None,
    exclude: Annotated[
        str | None, typer.Option(help="Names of linears to leave out, with commas.")
    ] = None,
) -> None:
    """Write a PEFT adapter of the fine-tune by truncated SVD of what it changed in each linear.

    The error per linear is in extract_report.json. What no adapter can carry is named there and
    here.
    """
    from fader_adapters.weightspace import extract as library

    selection = _selection(targets, exclude)
    sources = open_model(finetune), open_model(base)
    with watched() as tell:
        done = library.extract(
            *sources, out, rank=rank, targets=selection, base_name=base, progress=tell
        )
    loss = done.report["overall"]
    typer.echo(
        f"{out}: {loss['linears']} linears, {done.report['unchanged']} unchanged; "
        f"error {loss['relative_error']:.3g} of the delta's norm ({library.REPORT_FILE})"
    )
    if done.lost:
        shown = ", ".join(item.name for item in done.lost[:_SHOWN])
        more = f" and {len(done.lost) - _SHOWN} more" if len(done.lost) > _SHOWN else ""
        told = (
            f"WARNING: the fine-tune also changed {shown}{more}: the adapter does not carry these, "
            "and its answers will differ"
        )
        typer.secho(told, err=True, fg=typer.colors.RED, bold=True)


def _selection(targets: str | None, exclude: str | None) -> "Targets":
    from fader_adapters.targets import ALL_LINEAR, Targets

    return Targets(
        ALL_LINEAR if targets is None else _names(targets),
        frozenset() if exclude is None else _names(exclude),
    )


def _names(given: str) -> frozenset[str]:
    return frozenset(name.strip() for name in given.split(",") if name.strip())
