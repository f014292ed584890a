"""`fader bench` as a subcommand of the argparse command line. Loads the rest only when it runs."""

import argparse
from typing import Any

_NO_PREFIX = "\0"
"""Stands in no argument: every word, flags too, is left for the bench's own command line."""


def add_parser(subparsers: Any) -> None:  # noqa: ANN401 - argparse has no public name for it
    """Add the command; its flags are read by `bench_app`."""
    parser = subparsers.add_parser(
        "bench", help="measure a running server", add_help=False, prefix_chars=_NO_PREFIX
    )
    parser.add_argument("words", nargs="*")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the bench. Raises SystemExit with its exit code: 0, 1 or 2."""
    from fader_server.bench.cli import bench_app

    bench_app(arguments.words, prog_name="fader bench")
