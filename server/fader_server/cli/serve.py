"""`fader serve`: every setting of ServeConfig as a flag."""

import argparse
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fader_server import config


def add_parser(subparsers: Any) -> None:  # noqa: ANN401 - argparse has no public name for it
    """Add the command and its flags."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a base and its adapters over OpenAI's API",
        description="Each flag may also be a FADER_ variable or a key of the --config file.",
    )
    for setting in config.settings():
        if setting.positional:
            parser.add_argument(setting.name, nargs="?", metavar=setting.metavar, help=setting.help)
        elif setting.switch:
            parser.add_argument(
                setting.flag, action=argparse.BooleanOptionalAction, default=None, help=setting.help
            )
        else:
            action = "append" if setting.many else "store"
            parser.add_argument(
                setting.flag, action=action, metavar=setting.metavar, help=setting.help
            )
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Serve until a signal ends it."""
    flags = {name: value for name, value in vars(arguments).items() if name != "run"}
    settings = config.load(flags, os.environ)
    # The rest is imported now: settings are checked before torch takes its seconds.
    from fader_server.launch import run as launch
    from fader_server.world import open_world

    launch(settings, open_world, version=_version())


def _version() -> str:
    try:
        return version("fader")
    except PackageNotFoundError:  # run from a source tree
        return "0"
