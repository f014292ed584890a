"""What commands that drive a running server share: flags, the client, tables and a spinner."""

import inspect
import json
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fader_server import config
from fader_server.cli.flags import flags_of
from fader_server.definitions import settings_of
from fader_server.errors import ServerFailed

if TYPE_CHECKING:
    from fader_server.client import Client

_WIDE = 240
"""Columns of a table that no terminal shows."""
_Given = ParamSpec("_Given")


@dataclass(frozen=True, slots=True)
class Session:
    """One command at work."""

    client: "Client"
    as_json: bool

    def tell(self, answer: object, text: str) -> None:
        """One line for a person, or the server's answer for a program."""
        if self.as_json:
            self._tell_json(answer)
        else:
            typer.echo(text)

    def table(self, answer: object, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table for a person, or the server's answer for a program."""
        if self.as_json:
            self._tell_json(answer)
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for head in heads:
            table.add_column(head, overflow="fold", no_wrap=not sys.stdout.isatty())
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        _console().print(table)

    def facts(self, answer: object, facts: Mapping[str, object]) -> None:
        """Names and values, one a line, or the server's answer for a program."""
        if self.as_json:
            self._tell_json(answer)
            return
        grid = Table.grid(padding=(0, 2))
        for name, value in facts.items():
            grid.add_row(Text(name, style="dim"), Text(printable(value)))
        _console().print(grid)

    def _tell_json(self, answer: object) -> None:
        typer.echo(json.dumps(answer, indent=1))

    @contextmanager
    def patiently(self, what: str) -> Iterator[None]:
        """A spinner with a clock on a terminal, for what may take long."""
        console = Console(file=sys.stderr)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as progress:
            progress.add_task(printable(what), total=None)
            yield


def connected(work: Callable[Concatenate[Session, _Given], None]) -> Callable[..., None]:
    """The work as a command, with the flags of ClientConfig and --json; a Session comes first."""
    flags = flags_of(settings_of(config.ClientConfig))
    hints = typing.get_type_hints(work, include_extras=True)
    own = [
        item.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[item.name])
        for item in list(inspect.signature(work).parameters.values())[1:]
    ]
    as_json = Annotated[bool, typer.Option("--json", help="The server's answer as JSON.")]
    parameters = [*own, *flags, _switch("as_json", as_json)]

    def command(**given: Any) -> None:  # noqa: ANN401 - each has its own type, checked by typer
        from fader_server.client import Client

        values = {flag.name: given.pop(flag.name) for flag in flags}
        wanted = given.pop("as_json")
        settings = config.load_client(
            {name: value for name, value in values.items() if value not in (None, [])}, os.environ
        )
        with Client(settings) as client:
            try:
                work(Session(client, wanted), **given)  # pyright: ignore[reportCallIssue]
            except KeyError as missing:
                raise ServerFailed(
                    f"{settings.url} left out {missing}: is it a Fader of this version?"
                ) from missing

    command.__name__, command.__doc__ = work.__name__, work.__doc__
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    return command


def printable(value: object) -> str:
    """The text of a value without control characters."""
    return "".join(c if c.isprintable() else " " for c in str(value))


def _switch(name: str, kind: Any) -> inspect.Parameter:  # noqa: ANN401 - typer's own
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)


def _console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
