"""Argument checks of the native binding: each names the argument, what it wants and what came."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16)


def tensor(
    name: str,
    value: object,
    dtypes: Sequence[torch.dtype],
    *,
    shape: Sequence[int | None] | None = None,
) -> Tensor:
    """`value` as a contiguous CPU tensor of one of `dtypes`; None in `shape` takes any size.

    Raises: TypeError (not a tensor, wrong dtype), ValueError (device, layout, shape).
    """
    result = rows(name, value, dtypes, shape=shape)
    if not result.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got {list(result.shape)}, strides {result.stride()}"
        )
    return result


def rows(
    name: str,
    value: object,
    dtypes: Sequence[torch.dtype],
    *,
    shape: Sequence[int | None] | None = None,
) -> Tensor:
    """Like `tensor`, but only the last dimension need be contiguous."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {value.dtype}")
    if value.device.type != "cpu" or value.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense CPU tensor, got {value.device}, {value.layout}")
    if value.ndim and value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, got strides {value.stride()}"
        )
    if shape is not None and (
        value.ndim != len(shape)
        or any(
            want is not None and want != got for want, got in zip(shape, value.shape, strict=True)
        )
    ):
        wanted = ", ".join("*" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(value.shape)}")
    return value


def inputs(name: str, value: object, dtypes: Sequence[torch.dtype], width: int) -> Tensor:
    """`value` as rows [T, width] that do not overlap."""
    result = rows(name, value, dtypes, shape=(None, width))
    if row_stride(result) < width:
        raise ValueError(f"{name} must not overlap its own rows, got strides {result.stride()}")
    return result


def row_stride(value: Tensor) -> int:
    """Elements from one row to the next; one row alone may carry any stride: its length is used."""
    return value.stride(0) if value.shape[0] > 1 else max(value.shape[1], 1)


def positive(name: str, value: int) -> int:
    """`value` as a positive int."""
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
    return value


def output(name: str, value: Tensor | None, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`value` checked as an output of `shape` and `dtype` (rows may be strided), or a new one."""
    if value is None:
        return torch.empty(shape, dtype=dtype)
    rows(name, value, (dtype,), shape=shape)
    if value.shape[0] > 1 and value.stride(0) < shape[1]:
        raise ValueError(f"{name} must not overlap its own rows, got strides {value.stride()}")
    return value
