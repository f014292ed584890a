"""The `fader` command: finds the subcommand, turns errors into one line and an exit code."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from fader_adapters.errors import AdapterError
from fader_server.cli import serve
from fader_server.errors import ConfigInvalid, FaderError, ModelUnsupported

COMMANDS = (serve,)
"""Modules with `add_parser(subparsers)`, which sets `run`: a function of the parsed arguments."""

_MENDABLE = (ConfigInvalid, ModelUnsupported, AdapterError)


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are ConfigInvalid instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigInvalid(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = OneLineParser(prog="fader", description="Many LoRA adapters over one NF4 base.")
    subparsers = root.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. 0: done, 2: something the user can mend, 1: a fault."""
    try:
        parsed = parser().parse_args(arguments)
        parsed.run(parsed)
    except _MENDABLE as error:
        sys.stderr.write(f"fader: {_one_line(error)}\n")
        return 2
    except FaderError as error:
        sys.stderr.write(f"fader: {_one_line(error)}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
