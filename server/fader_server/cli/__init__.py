"""The `fader` command: finds the subcommand, turns errors into one line and an exit code."""

import errno
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from fader_adapters.errors import AdapterError
from fader_server.bench.cli import bench_app
from fader_server.bench.merge_cli import merge as bench_merge
from fader_server.bench.scale_cli import scale
from fader_server.bench.swap_cli import swap
from fader_server.cli.adapters import adapters_app
from fader_server.cli.compress import compress
from fader_server.cli.extract import extract
from fader_server.cli.inspect import inspect
from fader_server.cli.kernels import kernels
from fader_server.cli.merge import merge
from fader_server.cli.quantize import quantize
from fader_server.cli.serve import serve
from fader_server.cli.verify import verify
from fader_server.cli.version import version
from fader_server.errors import ConfigInvalid, FaderError, ModelUnsupported, ServerRefused

_MENDABLE = (ConfigInvalid, ModelUnsupported, ServerRefused, AdapterError)
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What the parser raises for any wrong flag; typer exports its children only."""

app = typer.Typer(
    help="Many LoRA adapters and blends over one NF4 base.",
    add_completion=False,
    rich_markup_mode=None,  # tables cut long names of flags in a terminal of usual width
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command(short_help="Write a base in NF4, so that loading it is fast.")(quantize)
app.command(short_help="What an adapter holds, and whether it fits a base.")(inspect)
app.command(short_help="Compare logprobs with those of transformers and PEFT.")(verify)
app.command(short_help="Write a base and adapters as one checkpoint.")(merge)
app.command(short_help="Write what a fine-tune changed as a PEFT adapter.")(extract)
app.command(short_help="Write a blend of adapters as one adapter.")(compress)
bench_app.command(short_help="Time the native CPU kernels beside torch and others.")(kernels)
bench_app.command("merge", short_help="Measure the merged lane of a running server.")(bench_merge)
bench_app.command(short_help="What swaps without a pause cost running streams.")(swap)
bench_app.command(short_help="What many adapters cost, and one more of them.")(scale)
app.add_typer(bench_app, name="bench")
app.add_typer(adapters_app, name="adapters")


def _tell_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"fader {version()}\n")
        raise typer.Exit


@app.callback()
def _root(
    show: Annotated[
        bool,
        typer.Option("--version", help="Tell the version.", callback=_tell_version, is_eager=True),
    ] = False,
) -> None:
    """Many LoRA adapters and blends over one NF4 base."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. 0: done, 2: something the user can mend, 1: a fault."""
    # It recommends a package that fetches code from the network when it is imported.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    given = sys.argv[1:] if arguments is None else list(arguments)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - a stream that was closed
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    try:
        code = app(args=given or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except _UsageError as error:
        return _fail(f"{_one_line(error)} See --help.", 2)
    except _MENDABLE as error:
        return _fail(_one_line(error), 2)
    except FaderError as error:
        return _fail(_one_line(error), 1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return _fail(f"{_one_line(error)}; make room and try again", 2)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"fader: {message}\n")
    return code


def _one_line(error: Exception) -> str:
    told = getattr(error, "format_message", lambda: str(error))()
    return " ".join(told.split()) or type(error).__name__
