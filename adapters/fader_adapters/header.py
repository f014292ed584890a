"""A safetensors header, checked before any tensor is made. Knows neither LoRA nor torch."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fader_adapters.errors import AdapterInvalid, AdapterTooLarge
from fader_adapters.limits import Limits
from fader_adapters.strict_json import load_object

ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""The dtypes an adapter may use; told without torch, which knows all of them (see `dtypes`)."""

_WHAT = "the header of adapter_model.safetensors"
_NOT_WEIGHTS = {
    b"version https://git-lfs": "a Git LFS pointer (fetch with git lfs pull)",
    b"<!doctype html": "a web page (a download that went wrong)",
    b"<html": "a web page (a download that went wrong)",
    b"gguf": "a GGUF file",
    b"pk\x03\x04": "a zip archive, as torch.save makes them",
    b"\x93numpy": "a NumPy file",
}
"""How what often lies in the place of weights begins; read as a length it would be a huge one."""
_MAX_NAME = 512
_MAX_DIMS = 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors buffer."""

    name: str
    dtype: str
    """A key of ELEMENT_BYTES."""
    shape: tuple[int, ...]
    """No dimension is 0."""
    start: int
    """First byte, from the start of the buffer."""
    end: int
    """One past the last byte."""


def read_header(weights: bytes, limits: Limits) -> tuple[TensorInfo, ...]:
    """The tensors of a safetensors buffer in file order, all of it accounted for.

    Stricter than the safetensors library: no duplicate names, no empty tensors, floats only,
    bounded header and tensor count. Raises AdapterInvalid, or AdapterTooLarge past a limit.
    """
    if len(weights) > limits.file_bytes:
        raise AdapterTooLarge(
            f"adapter_model.safetensors has {len(weights)} bytes, the limit is {limits.file_bytes}"
        )
    if len(weights) < 8:
        raise AdapterInvalid("adapter_model.safetensors is shorter than its 8-byte length field")
    for start, what in _NOT_WEIGHTS.items():
        if weights[: len(start)].lower() == start:
            raise AdapterInvalid(f"adapter_model.safetensors is {what}, not the weights")
    size = int.from_bytes(weights[:8], "little")
    if size > limits.header_bytes:
        raise AdapterTooLarge(f"{_WHAT} says {size} bytes, the limit is {limits.header_bytes}")
    if 8 + size > len(weights):
        raise AdapterInvalid(f"{_WHAT} says {size} bytes, the file ends before that")
    fields = load_object(weights[8 : 8 + size], _WHAT)
    _check_metadata(fields.pop("__metadata__", {}))
    if not fields:
        raise AdapterInvalid("adapter_model.safetensors holds no tensors")
    if len(fields) > limits.tensors:
        raise AdapterTooLarge(
            f"adapter_model.safetensors holds {len(fields)} tensors, the limit is {limits.tensors}"
        )
    infos = sorted(
        (_tensor(name, field, 8 + size, len(weights)) for name, field in fields.items()),
        key=lambda tensor: tensor.start,
    )
    _check_cover(infos, 8 + size, len(weights))
    return tuple(infos)


def _check_metadata(metadata: Any) -> None:  # noqa: ANN401 - it is a stranger's JSON
    if metadata is None:  # as MLX writes none
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterInvalid(f"__metadata__ in {_WHAT} must map strings to strings")


def _tensor(name: str, field: Any, start: int, end: int) -> TensorInfo:  # noqa: ANN401
    """One entry of the header; the data are bytes start..end of the buffer."""
    if not 0 < len(name) <= _MAX_NAME:
        raise AdapterInvalid(f"a tensor name has {len(name)} characters, expected 1 to {_MAX_NAME}")
    if not isinstance(field, dict) or field.keys() != {"dtype", "shape", "data_offsets"}:
        raise AdapterInvalid(f"tensor {name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise AdapterInvalid(
            f"tensor {name!r} has dtype {str(dtype)[:32]!r}, expected one of "
            f"{', '.join(ELEMENT_BYTES)}; save the adapter in one of these"
        )
    if _integers(shape) and 0 in shape:
        raise AdapterInvalid(
            f"tensor {name!r} has shape {str(shape)[:80]}, no elements: its weights were spread "
            "over several processes (DeepSpeed's ZeRO-3, FSDP) and not gathered when it was saved; "
            "save the whole state dict"
        )
    if not _integers(shape) or len(shape) > _MAX_DIMS or min(shape, default=1) < 1:
        raise AdapterInvalid(f"tensor {name!r} has shape {str(shape)[:80]}, expected sizes ≥ 1")
    if not _integers(offsets) or len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1]:
        raise AdapterInvalid(f"tensor {name!r} has data_offsets {str(offsets)[:80]}")
    if offsets[1] > end - start:  # before anything is said of numbers of any size
        raise AdapterInvalid(
            f"tensor {name!r} has data_offsets {str(offsets)[:80]}, the file has {end - start} "
            "bytes of data: truncated, or not this file's header"
        )
    if math.prod(shape) * ELEMENT_BYTES[dtype] != offsets[1] - offsets[0]:
        raise AdapterInvalid(
            f"tensor {name!r} of shape {str(shape)[:80]} and dtype {dtype} does not fill its "
            f"{offsets[1] - offsets[0]} bytes"
        )
    return TensorInfo(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _integers(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, list) and all(type(item) is int for item in value)


def _check_cover(infos: list[TensorInfo], start: int, end: int) -> None:
    """The tensors, sorted by start, tile bytes start..end with neither overlap nor hole."""
    if infos[0].start != start:
        raise AdapterInvalid(f"tensor {infos[0].name!r} does not start where the data starts")
    for before, after in pairwise(infos):
        if before.end != after.start:
            raise AdapterInvalid(
                f"tensors {before.name!r} and {after.name!r} overlap or leave a hole"
            )
    if infos[-1].end != end:
        raise AdapterInvalid(
            f"the tensors end at byte {infos[-1].end}, the file at {end}: truncated or padded"
        )
