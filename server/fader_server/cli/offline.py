"""What the offline commands share: terms, models, a progress bar, the disk's faults in one line."""

import errno
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from fader_adapters.errors import SourceNotFound
from fader_server.cli.weights import weight_in
from fader_server.errors import ConfigInvalid, FaderError

if TYPE_CHECKING:
    from fader_adapters.weightspace.progress import Progress
    from fader_adapters.weightspace.terms import Ingredient

_MENDABLE = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


class Dtype(StrEnum):
    """What a server computes in."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


ROOTS_HELP = "A folder of adapters, for terms that are names. May be given several times."


def read_terms(terms: Sequence[str], roots: Sequence[Path]) -> "list[Ingredient]":
    """`NAME_OR_DIR[:WEIGHT]` of every term. Raises SourceNotFound, ConfigInvalid, BlendInvalid."""
    from fader_adapters.weightspace.terms import Ingredient

    found = []
    for term in terms:
        name, weight = split_weight(term, roots)
        found.append(Ingredient(find_adapter(name, roots), 1.0 if weight is None else weight))
    return found


def split_weight(term: str, roots: Sequence[Path]) -> tuple[str, float | None]:
    """A name and its weight; a folder whose own name ends like one is a folder. Raises
    ConfigInvalid."""
    name, colon, weight = term.rpartition(":")
    if not colon or any(path.is_dir() for path in _places(term, roots)):
        return term, None
    return name, weight_in(weight, "NAME_OR_DIR:WEIGHT")


def find_adapter(name: str, roots: Sequence[Path]) -> Path:
    """The folder itself, or the one of this name under a root. Raises SourceNotFound."""
    for path in _places(name, roots):
        if path.is_dir():
            return path
    where = f" or under {', '.join(map(str, roots))}" if roots else "; name roots by --adapter-dir"
    raise SourceNotFound(f"no adapter folder at {name!r}{where}")


def _places(name: str, roots: Sequence[Path]) -> list[Path]:
    return [Path(name), *(root / name for root in roots if name and "/" not in name)]


def open_model(source: str) -> Path:
    """The local folder of a model. Raises ConfigInvalid, ModelUnsupported."""
    from fader_server.model import checkpoint

    checkpoint.read_config(source)
    return checkpoint.local_copy(source)


@contextmanager
def watched() -> "Iterator[Progress]":
    """A progress bar on a terminal; faults of the disk become errors of one line."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Bars(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        try:
            yield tell
        except OSError as error:
            kind = ConfigInvalid if error.errno in _MENDABLE else FaderError
            raise kind(f"the disk refused: {error}") from error
