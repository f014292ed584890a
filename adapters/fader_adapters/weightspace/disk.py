"""Files that are either whole or not there: shards written as a stream, JSON, one writer a folder.

Knows the safetensors layout; knows nothing of models.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fader_adapters.dtypes import DTYPE_NAMES
from fader_adapters.errors import TargetTaken
from fader_adapters.weightspace.tensors import bytes_of

PART = ".part"
"""Ends the name of a file that is being written."""

_ENTRY = 384
"""Bytes of a header's entry beyond its name, at most."""
_ALIGN = 8


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file."""

    nbytes: int
    sha256: str


class ShardWriter:
    """One safetensors file, tensor after tensor; what was added is not kept in memory.

    The header's room is reserved from the names and filled at the end. Tensors whose bytes would
    leave the next one unaligned wait in memory for the end of the file; they are small or odd.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        """`names`: everything that will be added."""
        room = 64 + sum(len(json.dumps(name)) + _ENTRY for name in names)
        self._room = -(-room // _ALIGN) * _ALIGN
        self._path = path
        self._part = path.with_name(path.name + PART)
        self._file: BinaryIO = self._part.open("wb")
        self._file.seek(8 + self._room)
        self._entries: dict[str, dict[str, Any]] = {}
        self._at = 0
        self._waiting: list[tuple[str, torch.Tensor]] = []

    def add(
        self,
        name: str,
        pieces: Iterable[torch.Tensor],
        *,
        dtype: torch.dtype,
        shape: tuple[int, ...],
    ) -> None:
        """Append a tensor that comes as contiguous pieces of `dtype`, together of `shape`."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if size % _ALIGN:
            whole = torch.cat([piece.reshape(-1) for piece in pieces]).view(shape)
            assert whole.dtype == dtype
            self._waiting.append((name, whole))
            return
        start = self._at
        for piece in pieces:
            assert piece.dtype == dtype
            self._append(piece)
        assert self._at - start == size
        self._note(name, dtype, shape, start)

    def finish(self) -> Written:
        """Write the header, bring everything to the disk and give the file its name."""
        for name, whole in sorted(self._waiting, key=lambda item: -item[1].dtype.itemsize):
            start = self._at
            self._append(whole)
            self._note(name, whole.dtype, tuple(whole.shape), start)
        header = json.dumps(
            {"__metadata__": {"format": "pt"}, **self._entries}, separators=(",", ":")
        ).encode()
        assert len(header) <= self._room
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        _sync_and_close(self._file)
        written = hash_file(self._part)
        _rename(self._part, self._path)
        return written

    def close(self) -> None:
        """Let go of the file, finished or not. Idempotent."""
        self._file.close()

    def _append(self, piece: torch.Tensor) -> None:
        if piece.numel():
            self._at += self._file.write(bytes_of(piece.contiguous()))

    def _note(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], start: int) -> None:
        assert name not in self._entries
        self._entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, self._at],
        }


def write_json(path: Path, document: object) -> None:
    """Replace `path` by `document` in one instant."""
    write_bytes(path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one instant."""
    part = path.with_name(path.name + PART)
    with part.open("wb") as file:
        file.write(data)
        _sync_and_close(file)
    _rename(part, path)


def hash_file(path: Path) -> Written:
    """Size and sha256 of a file, read in pieces."""
    state, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 22):
            state.update(piece)
            size += len(piece)
    return Written(size, state.hexdigest())


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Make `directory` and keep other runs out of it. Raises TargetTaken while one is in it.

    The lock is the kernel's: it ends with the process, however that ends.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise TargetTaken(f"{directory} is a file; name a new directory") from None
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise TargetTaken(f"another run writes {directory}; wait for it") from None
    try:
        yield
    finally:
        os.close(fd)


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _rename(part: Path, path: Path) -> None:
    os.replace(part, path)
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
