"""Adapter files from disk: inside roots, regular files only, each read once. Parses nothing."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

from fader_adapters.errors import (
    AdapterInvalid,
    AdapterTooLarge,
    SourceForbidden,
    SourceIncomplete,
    SourceNotFound,
    SourceUnavailable,
)
from fader_adapters.limits import Limits
from fader_adapters.mlx import in_peft_terms
from fader_adapters.roots import CONFIG_FILE, WEIGHTS_FILE, WEIGHTS_FILES, Found, PassedOver, look
from fader_adapters.strangers import what_is_there

PICKLE_FILE = "adapter_model.bin"

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: a FIFO put in a file's place between stat and open must not hang the loader.
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

_PASSING = {
    errno.EAGAIN,
    errno.EINTR,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOTCONN,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
"""What is the system's or the disk's, not the file's: the same call may succeed later."""


@dataclass(frozen=True, slots=True)
class RawAdapter:
    """An adapter's two files as private bytes, in PEFT's terms: nothing on disk can change them."""

    config: bytes
    weights: bytes
    origin: str
    """Where they came from; shown to administrators only."""
    revision: str | None = None
    """The commit a Hub reference meant at that moment."""

    @classmethod
    def of(
        cls, files: tuple[bytes, bytes], origin: str, limits: Limits, revision: str | None = None
    ) -> Self:
        """From config and weights as PEFT or MLX-LM left them. Raises as `in_peft_terms` does."""
        return cls(*in_peft_terms(*files, limits), origin, revision)


class LocalSources:
    """Adapter directories under allowed roots. Safe to use from any thread."""

    def __init__(self, roots: tuple[Path, ...], limits: Limits | None = None) -> None:
        """`roots` are resolved now, so a symlink to a root is fine and one inside a root is not.

        Raises SourceNotFound when a root is not a directory.
        """
        self._limits = limits or Limits()
        self._roots: list[tuple[PurePosixPath, Path]] = []
        for root in roots:
            resolved = root.resolve()
            if not resolved.is_dir():
                raise SourceNotFound(f"the adapter root {str(root)!r} is not a directory")
            self._roots.append((PurePosixPath(os.path.abspath(root)), resolved))

    def fetch(self, reference: str) -> RawAdapter:
        """Read an adapter that a client named: relative to the roots in order, or inside one.

        Raises SourceForbidden, SourceNotFound, SourceUnavailable, AdapterTooLarge, or
        AdapterInvalid for pickle files and files that change while they are read.
        """
        incomplete: SourceIncomplete | None = None
        for root, parts in self._candidates(reference):
            try:
                with _descend(root, parts) as directory:
                    return self._read_pair(directory, str(root.joinpath(*parts)), follow=False)
            except SourceIncomplete as error:
                incomplete = incomplete or error
            except SourceNotFound:
                continue
        raise incomplete or SourceNotFound(f"no adapter at {reference[:200]!r}")

    def fetch_trusted(self, path: Path) -> RawAdapter:
        """Read an adapter the operator named: any directory, symlinks followed.

        Raises as `fetch` does.
        """
        with _opened(path, _DIRECTORY) as directory:
            return self._read_pair(directory, str(path), follow=True)

    def holds(self, reference: str) -> bool:
        """Whether a directory stands at a client's reference. Raises SourceForbidden,
        SourceUnavailable."""
        for root, parts in self._candidates(reference):
            try:
                with _descend(root, parts):
                    return True
            except SourceNotFound:
                continue
        return False

    def discover(self) -> list[Found]:
        """Adapter directories directly under the roots; the first root wins. Raises OSError."""
        found: dict[str, Found] = {}
        for _, root in self._roots:
            for folder in look(root)[0]:
                found.setdefault(folder.name, folder)
        return sorted(found.values(), key=lambda item: item.name)

    def passed_over(self) -> list[PassedOver]:
        """Folders directly under the roots that cannot become adapters. Raises OSError."""
        return [folder for _, root in self._roots for folder in look(root)[1]]

    def _candidates(self, reference: str) -> list[tuple[Path, tuple[str, ...]]]:
        path = PurePosixPath(reference)
        if not reference or "\0" in reference or ".." in path.parts:
            raise SourceForbidden("a source must be a path inside an adapter root, without '..'")
        if not path.is_absolute():
            if not path.parts:
                raise SourceForbidden("a source must name a directory under an adapter root")
            return [(root, path.parts) for _, root in self._roots]
        inside = [
            (root, path.relative_to(prefix).parts)
            for given, root in self._roots
            for prefix in dict.fromkeys((given, PurePosixPath(root)))
            if path.is_relative_to(prefix)
        ]
        if not inside:
            raise SourceForbidden(f"{reference[:200]!r} lies outside the adapter roots")
        return inside

    def _read_pair(self, directory: int, origin: str, *, follow: bool) -> RawAdapter:
        name = next((name for name in WEIGHTS_FILES if _exists(name, directory)), WEIGHTS_FILE)
        try:
            config = _read_file(
                CONFIG_FILE, directory=directory, cap=self._limits.config_bytes, follow=follow
            )
            weights = _read_file(
                name, directory=directory, cap=self._limits.file_bytes, follow=follow
            )
        except SourceNotFound:
            if _exists(CONFIG_FILE, directory) and _exists(PICKLE_FILE, directory):
                raise only_pickle() from None
            raise SourceIncomplete(what_is_there(directory)) from None
        return RawAdapter.of((config, weights), origin, self._limits)


def only_pickle() -> AdapterInvalid:
    """The refusal of a source that has no safetensors."""
    return AdapterInvalid(
        f"expected {WEIGHTS_FILE}, found only {PICKLE_FILE}: pickle files run code and "
        "are never opened; save the adapter with safe_serialization=True"
    )


@contextmanager
def _descend(root: Path, parts: tuple[str, ...]) -> Iterator[int]:
    """Open root/parts as a directory, one component at a time, following no symlink."""
    fd = _open(root, _DIRECTORY)
    try:
        for part in parts:
            inner = _open(part, _DIRECTORY | os.O_NOFOLLOW, directory=fd)
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _opened(path: str | Path, flags: int, *, directory: int | None = None) -> Iterator[int]:
    fd = _open(path, flags, directory=directory)
    try:
        yield fd
    finally:
        os.close(fd)


def _open(path: str | Path, flags: int, *, directory: int | None = None) -> int:
    try:
        return os.open(path, flags, dir_fd=directory)
    except (FileNotFoundError, ValueError):
        raise SourceNotFound("no such file or directory") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise SourceNotFound("no such file or directory") from None
        _check_passing(error, f"{path} cannot be opened")
        raise SourceForbidden(
            f"a component of the source cannot be opened ({_named(error)}):"
            " expected plain directories and files, no symlinks"
        ) from None


def _read_file(name: str, *, directory: int, cap: int, follow: bool) -> bytes:
    """One read of a regular file of at most `cap` bytes inside the open `directory`."""
    try:
        # Before opening: opening a device may already do something.
        mode = os.stat(name, dir_fd=directory, follow_symlinks=follow).st_mode
    except FileNotFoundError:
        raise SourceNotFound(f"the directory has no {name}") from None
    except OSError as error:
        _check_passing(error, f"{name} cannot be examined")
        raise SourceForbidden(f"{name} cannot be examined") from None
    _require_regular(name, mode)
    flags = _FILE if follow else _FILE | os.O_NOFOLLOW
    with _opened(name, flags, directory=directory) as fd, _readable(name):
        status = os.fstat(fd)
        _require_regular(name, status.st_mode)
        if status.st_size > cap:
            raise AdapterTooLarge(f"{name} has {status.st_size} bytes, the limit is {cap}")
        data = _read_exactly(fd, status.st_size)
    if len(data) != status.st_size:
        raise AdapterInvalid(
            f"{name} changed while it was read; write a new file and rename it into place"
        )
    return data


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """What a disk or too little memory does to an open file, as errors of the adapter."""
    try:
        yield
    except OSError as error:
        raise SourceUnavailable(
            f"{name} cannot be read ({_named(error)}); mend the disk and try again"
        ) from None
    except MemoryError:
        raise AdapterTooLarge(f"{name} is larger than the memory that is free for it") from None


def _check_passing(error: OSError, what: str) -> None:
    """Raises SourceUnavailable."""
    if error.errno in _PASSING:
        raise SourceUnavailable(f"{what} ({_named(error)}); try again") from None


def _named(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "no reason given")


def _read_exactly(fd: int, size: int) -> bytes:
    """At most size + 1 bytes, so that growth shows; usually one system call and no second copy."""
    data = os.read(fd, size + 1)
    if not 0 < len(data) < size:
        return data + os.read(fd, 1) if len(data) == size else data
    whole = bytearray(size + 1)  # the system gives no more than 2 GiB at a time
    view, at = memoryview(whole), len(data)
    view[:at] = data
    del data
    while at <= size and (more := os.readv(fd, [view[at:]])):
        at += more
    view.release()
    del whole[at:]
    return bytes(whole)


def _require_regular(name: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise SourceForbidden(f"{name} is not a regular file")


def _exists(name: str, directory: int) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return True
