"""`fader merge`: a base and a blend as one checkpoint."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fader_server.cli.offline import ROOTS_HELP, open_model, read_terms, watched

_ENOUGH = 0.9
"""Of the delta; less is warned about."""


class Form(StrEnum):
    """What the merged linears are in."""

    BF16 = "bf16"
    NF4 = "nf4"


def merge(
    blend: Annotated[
        list[str],
        typer.Argument(
            help="Adapters, each with its weight: ./tone:0.7 ./domain:-0.2",
            metavar="NAME_OR_DIR[:WEIGHT]...",
        ),
    ],
    base: Annotated[str, typer.Option(help="A local folder or a Hub id.", metavar="MODEL")],
    out: Annotated[Path, typer.Option(help="A new folder, or an interrupted merge to go on with.")],
    dtype: Annotated[
        Form, typer.Option(help="bf16: exact up to rounding; nf4: bitsandbytes' 4 bits.")
    ] = Form.BF16,
    adapter_dir: Annotated[list[Path] | None, typer.Option(help=ROOTS_HELP)] = None,
    shard_mib: Annotated[int, typer.Option(min=1, help="Size of a file, in MiB.")] = 2048,
) -> None:
    """Write base and adapters as one checkpoint that transformers and Fader load.

    What the rounding cost is told per linear in merge_report.json. Interrupted, the same command
    goes on.
    """
    from fader_adapters.weightspace import merge as library

    terms = read_terms(blend, adapter_dir or ())
    source = open_model(base)
    with watched() as tell:
        done = library.merge(
            source,
            terms,
            out,
            form=dtype.value,
            shard_bytes=shard_mib << 20,
            progress=tell,
        )
    loss = done.report["overall"]
    kept = f", {done.kept} of them finished before" if done.kept else ""
    typer.echo(f"{out}: {done.shards} files{kept}, {loss['linears']} linears merged")
    typer.echo(
        f"rounding error {loss['relative_error']:.3g} of the delta's norm, "
        f"{loss['survival']:.1%} of the delta survives ({library.REPORT_FILE})"
    )
    if loss["survival"] < _ENOUGH:
        told = (
            "WARNING: rounding to 4 bits takes much of this delta away; use --dtype bf16, or name "
            "the unquantised model as --base"
        )
        typer.secho(told, err=True, fg=typer.colors.RED, bold=True)
