"""What the commands of `fader bench` share: their common flags, how they fail, what they write."""

import json
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console

from fader_server.bench.machine import machine_facts, safe_command
from fader_server.errors import ConfigInvalid

_T = TypeVar("_T")

Url = Annotated[str, typer.Option(help="The server's root.")]
Key = Annotated[
    str | None,
    typer.Option(envvar="FADER_ADMIN_KEY", help="Bearer token that may load adapters."),
]
Vocab = Annotated[int | None, typer.Option(help="Vocabulary size, where the server is silent.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the whole result here.")]


def checked(work: Callable[[], _T]) -> _T:
    """The result of `work`, or one line and exit code 2 for what the user can mend."""
    try:
        return work()
    except ConfigInvalid as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(2) from None


def failed(faults: Iterable[str]) -> NoReturn:
    """The first faults and exit code 1."""
    errors = Console(stderr=True)
    errors.print("FAILED, no figures", style="bold red")
    for fault in list(faults)[:8]:
        errors.print(f"  {fault}", style="red", markup=False)
    raise typer.Exit(1)


def write_json(path: Path | None, begun: dict[str, Any], document: dict[str, Any]) -> None:
    """The result and what stood before it; nothing without a path."""
    if path is not None:
        path.write_text(json.dumps(begun | document, indent=1) + "\n")


def names_in(text: str) -> tuple[str, ...]:
    """Words with commas between, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def begin() -> dict[str, Any]:
    """What a reader needs to judge and repeat a run, as it is before it."""
    return {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["fader", *safe_command(sys.argv[1:])],
        "client": machine_facts(),
    }
