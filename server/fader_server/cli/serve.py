"""`fader serve`: every setting of ServeConfig as a flag."""

import inspect
import os
from typing import Annotated, Any

import typer

from fader_server import config
from fader_server.cli.version import version


def serve(**flags: object) -> None:
    """Serve a base and its adapters over OpenAI's API.

    Without MODEL: the bundled demo. Each flag may also be a FADER_ variable or a key of the
    --config file.
    """
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    settings = config.load(given, os.environ)
    # The rest is imported now: settings are checked before torch takes its seconds.
    from fader_server.launch import run
    from fader_server.world import open_world

    run(settings, open_world, version=version())


def _parameter(name: str, kind: Any, info: Any) -> inspect.Parameter:  # noqa: ANN401 - typer's own
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, info],
    )


def _parameters() -> list[inspect.Parameter]:
    """One parameter a setting: the definition in ServeConfig is the only one."""
    found = []
    for setting in config.settings():
        if setting.positional:
            argument = typer.Argument(help=setting.help, metavar=setting.metavar)
            found.append(_parameter(setting.name, str, argument))
        elif setting.switch:
            names = f"{setting.flag}/--no-{setting.flag.removeprefix('--')}"
            found.append(_parameter(setting.name, bool, typer.Option(names, help=setting.help)))
        else:
            option = typer.Option(setting.flag, help=setting.help, metavar=setting.metavar)
            found.append(_parameter(setting.name, list[str] if setting.many else str, option))
    file = typer.Option("--config", help="TOML file with settings", metavar="FILE")
    return [*found, _parameter("config", str, file)]


serve.__signature__ = inspect.Signature(_parameters())  # pyright: ignore[reportFunctionMemberAccess]
serve.__annotations__ = {p.name: p.annotation for p in _parameters()}
