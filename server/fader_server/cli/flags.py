"""Settings as a command's flags: the definition of the setting is the only one."""

import inspect
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from fader_server.definitions import Setting


def flags_of(settings: Iterable[Setting]) -> list[inspect.Parameter]:
    """One parameter a setting, and --config."""
    found = []
    for setting in settings:
        if setting.positional:
            argument = typer.Argument(help=_help(setting), metavar=setting.metavar)
            found.append(_parameter(setting.name, str, argument))
        elif setting.switch:
            names = f"{setting.flag}/--no-{setting.flag.removeprefix('--')}"
            found.append(_parameter(setting.name, bool, typer.Option(names, help=_help(setting))))
        else:
            option = typer.Option(setting.flag, help=_help(setting), metavar=setting.metavar)
            found.append(_parameter(setting.name, list[str] if setting.many else str, option))
    file = typer.Option("--config", help="TOML file with settings", metavar="FILE")
    return [*found, _parameter("config", str, file)]


def _parameter(name: str, kind: Any, info: Any) -> inspect.Parameter:  # noqa: ANN401 - typer's own
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, info],
    )


def _help(setting: Setting) -> str:
    return f"{setting.help} (default: {setting.default})" if setting.default else setting.help
