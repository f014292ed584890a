"""The safetensors files of a model, read tensor by tensor with plain reads. Knows no linears."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from fader_adapters.dtypes import DTYPES
from fader_adapters.errors import AdapterInvalid, CheckpointInvalid, SourceNotFound
from fader_adapters.strict_json import load_object

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_MAX_HEADER = 100_000_000
"""Bytes; what the safetensors library allows."""
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor lies."""

    key: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Checkpoint:
    """A directory with `model.safetensors`, or with shards and their index."""

    def __init__(self, directory: Path) -> None:
        """Reads headers only. Raises SourceNotFound, CheckpointInvalid."""
        self.directory = directory
        placed = _index(directory)
        names = [SINGLE_FILE] if placed is None else sorted(set(placed.values()))
        self.files = tuple(directory / name for name in names)
        self.tensors: dict[str, Stored] = {}
        for file in self.files:
            for stored in _header(file):
                if placed is None or placed.get(stored.key) == file.name:
                    self.tensors[stored.key] = stored
        lost = next((key for key in placed or () if key not in self.tensors), None)
        if placed is not None and lost is not None:
            raise CheckpointInvalid(
                f"{INDEX_FILE} places {lost!r} in {placed[lost]}, which does not hold it"
            )

    def read(self, key: str) -> torch.Tensor:
        """A private copy of one whole tensor."""
        stored = self.tensors[key]
        flat = torch.empty(stored.nbytes, dtype=torch.uint8)
        _fill(flat, stored, 0)
        return flat.view(stored.dtype).view(stored.shape)

    def chunks(self, key: str, *, elements: int = 1 << 20) -> Iterator[torch.Tensor]:
        """The same in order as flat pieces of at most `elements`, private copies."""
        stored = self.tensors[key]
        for start in range(0, stored.numel, elements):
            count = min(elements, stored.numel - start)
            flat = torch.empty(count * stored.dtype.itemsize, dtype=torch.uint8)
            _fill(flat, stored, start * stored.dtype.itemsize)
            yield flat.view(stored.dtype)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, writable."""
    return memoryview(cast(Any, tensor.view(-1).view(torch.uint8).numpy()))


def _index(directory: Path) -> dict[str, str] | None:
    """Key → file name from the index; None when one file holds everything."""
    if (directory / SINGLE_FILE).is_file():
        return None
    try:
        fields = load_object((directory / INDEX_FILE).read_bytes(), INDEX_FILE)
    except FileNotFoundError:
        if any((directory / name).exists() for name in _PICKLES):
            raise CheckpointInvalid(
                f"{directory}: the weights are pickle files, which run code and are never opened; "
                "save the model as safetensors"
            ) from None
        raise SourceNotFound(f"{directory}: expected {SINGLE_FILE} or {INDEX_FILE}") from None
    except AdapterInvalid as error:
        raise CheckpointInvalid(f"{directory}: {error}") from None
    placed = fields.get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(map(_plain_name, placed.values())):
        raise CheckpointInvalid(f"{directory}: weight_map of {INDEX_FILE} must name plain files")
    return placed


def _plain_name(value: Any) -> bool:  # noqa: ANN401 - it is a stranger's JSON
    return isinstance(value, str) and value == os.path.basename(value) and value.strip(".") != ""


def _header(file: Path) -> Iterator[Stored]:
    try:
        with file.open("rb") as opened:
            whole = os.fstat(opened.fileno()).st_size
            size = int.from_bytes(opened.read(8), "little")
            if not 2 <= size <= min(_MAX_HEADER, whole - 8):
                raise CheckpointInvalid(f"{file}: truncated, or not a safetensors file")
            fields = load_object(opened.read(size), "the header")
    except FileNotFoundError:
        raise CheckpointInvalid(f"{file} is missing; fetch the whole checkpoint") from None
    except AdapterInvalid as error:
        raise CheckpointInvalid(f"{file}: {error}") from None
    fields.pop("__metadata__", None)
    for key, field in fields.items():
        yield _stored(file, key, field, data=8 + size, whole=whole)


def _stored(file: Path, key: str, field: Any, *, data: int, whole: int) -> Stored:  # noqa: ANN401
    try:
        dtype, shape = DTYPES[field["dtype"]], tuple(map(int, field["shape"]))
        start, end = map(int, field["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointInvalid(f"{file}: {key!r} is described in a way that is not read") from None
    stored = Stored(key, file, dtype, shape, data + start)
    if min((*shape, start), default=0) < 0 or end - start != stored.nbytes or data + end > whole:
        raise CheckpointInvalid(f"{file}: {key!r} does not lie inside the file: truncated?")
    return stored


def _fill(flat: torch.Tensor, stored: Stored, skip: int) -> None:
    """Read flat.numel() bytes from `skip` bytes into the tensor."""
    view = bytes_of(flat)
    fd = os.open(stored.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while view:
            count = os.preadv(fd, [view], stored.start + skip)
            if count == 0:
                raise CheckpointInvalid(f"{stored.file} became shorter while it was read")
            view = view[count:]
            skip += count
    finally:
        os.close(fd)
