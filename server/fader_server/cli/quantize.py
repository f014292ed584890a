"""`fader quantize`: write a base as a bitsandbytes NF4 checkpoint."""

from pathlib import Path
from typing import Annotated

import typer


def quantize(
    source: Annotated[str, typer.Argument(help="A local folder or a Hub id.", metavar="SRC")],
    target: Annotated[Path, typer.Argument(help="A new folder.", metavar="DST")],
    experts: Annotated[bool, typer.Option("--experts", help="Mixtures' experts, too.")] = False,
) -> None:
    """Quantise a base to NF4 with double quantisation, so that serving it starts fast.

    transformers reads the result too, unless experts are quantised.
    """
    from fader_server.model import writing
    from fader_server.model.device import choose_device

    writing.quantize(source, target, device=choose_device("cpu"), experts=experts)
    typer.echo(f"{target}: {sum(f.stat().st_size for f in target.iterdir()):,} bytes")
