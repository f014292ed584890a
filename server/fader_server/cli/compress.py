"""`fader compress`: a blend as one adapter."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fader_adapters.errors import BlendInvalid
from fader_server.cli.offline import (
    ROOTS_HELP,
    find_adapter,
    open_model,
    read_terms,
    split_weight,
    watched,
)

if TYPE_CHECKING:
    from fader_adapters.weightspace.terms import Ingredient


def compress(
    adapters: Annotated[list[str], typer.Argument(metavar="NAME_OR_DIR[:WEIGHT]...")],
    rank: Annotated[int, typer.Option(help="Largest rank of a linear.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    weights: Annotated[
        str | None,
        typer.Option(help="A weight for each adapter, with commas: --weights=0.7,-0.2"),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Check the adapters against this model.", metavar="MODEL")
    ] = None,
    adapter_dir: Annotated[list[Path] | None, typer.Option(help=ROOTS_HELP)] = None,
) -> None:
    """Write a blend of PEFT adapters as one: exactly where the ranks fit, else by SVD.

    The error per linear is in compress_report.json.
    """
    from fader_adapters.weightspace import compress as library
    from fader_adapters.weightspace.base import open_base

    blend = _blend(adapters, weights, adapter_dir or [])
    spec = None if base is None else open_base(open_model(base)).spec
    with watched() as tell:
        done = library.compress(blend, out, rank=rank, base=spec, progress=tell)
    loss = done.report["overall"]
    exact = sum(site["method"] == "concatenated" for site in done.report["linears"])
    typer.echo(
        f"{out}: {loss['linears']} linears, {exact} exactly; "
        f"error {loss['relative_error']:.3g} of the delta's norm ({library.REPORT_FILE})"
    )


def _blend(terms: list[str], weights: str | None, roots: list[Path]) -> "list[Ingredient]":
    if weights is None:
        return read_terms(terms, roots)
    if any(split_weight(term, roots)[1] is not None for term in terms):
        raise BlendInvalid("weights stand in the terms and in --weights; give them once")
    try:
        given = [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise BlendInvalid(f"--weights {weights!r}: expected numbers with commas") from None
    if len(given) != len(terms):
        raise BlendInvalid(f"--weights has {len(given)} numbers for {len(terms)} adapters")
    found = read_terms([str(find_adapter(term, roots)) for term in terms], ())
    return [replace(item, gamma=gamma) for item, gamma in zip(found, given, strict=True)]
