"""What lies directly under an adapter root: folders that may be adapters, and why others are not.

Knows names and files by their stamps; opens nothing.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from fader_adapters.spec import ADAPTER_NAME

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
WEIGHTS_FILES = (WEIGHTS_FILE, "adapters.safetensors")
"""PEFT's, and MLX-LM's; the first one that is there counts."""


@dataclass(frozen=True, slots=True)
class Found:
    """An adapter directory directly under a root."""

    name: str
    reference: str
    """What `fetch` takes."""
    stamp: tuple[int, ...]
    """Of both files: inode, size and times; another stamp, another content."""
    complete: bool
    """The weights are there too."""


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A folder under a root that cannot become an adapter."""

    name: str
    reason: str


def look(root: Path) -> tuple[list[Found], list[PassedOver]]:
    """Every folder directly under `root`, in the order of names; plain files and names that begin
    with a dot are nobody's. Raises OSError."""
    found: list[Found] = []
    passed: list[PassedOver] = []
    for entry in sorted(os.scandir(root), key=lambda item: item.name):
        if entry.name.startswith(".") or not os.path.isdir(entry.path):
            continue
        reason = _reason(entry)
        if reason:
            name = entry.name.encode(errors="backslashreplace").decode()
            passed.append(PassedOver(name, reason))
            continue
        config = _stamp(entry.path, CONFIG_FILE)
        if config:
            weights = next(filter(None, (_stamp(entry.path, n) for n in WEIGHTS_FILES)), ())
            stamp = config + weights
            found.append(Found(entry.name, entry.name, stamp, complete=bool(weights)))
    return found, passed


def _reason(entry: os.DirEntry[str]) -> str:
    """Why a folder is no adapter; empty: it may be one."""
    if entry.is_symlink():
        return "symlinked folders are not followed; name it with --adapter NAME=PATH, or move it"
    if not ADAPTER_NAME.fullmatch(entry.name):
        return (
            "an adapter's name has 1 to 128 letters, digits, '.', '_' or '-' and starts with a "
            "letter or digit; rename the folder"
        )
    try:
        mode = os.lstat(os.path.join(entry.path, CONFIG_FILE)).st_mode
    except FileNotFoundError:
        return "" if _holds_folders(entry.path) else f"the folder has no {CONFIG_FILE}"
    except OSError as error:
        return f"{CONFIG_FILE} cannot be examined: {error.strerror}"
    return "" if stat.S_ISREG(mode) else f"{CONFIG_FILE} is not a regular file"


def _holds_folders(directory: str) -> bool:
    """Whether it is a folder of folders, as `team/tone` has."""
    try:
        with os.scandir(directory) as entries:
            return any(entry.is_dir() for entry in entries)
    except OSError:
        return False


def _stamp(directory: str, name: str) -> tuple[int, ...]:
    """Empty when it is not a regular file."""
    try:
        status = os.lstat(os.path.join(directory, name))
    except OSError:
        return ()
    if not stat.S_ISREG(status.st_mode):
        return ()
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
