"""Small arrays to a device and back without making the host wait. Knows no requests.

A GPU's copies go through pinned memory of torch's caching allocator, which gives a block to
nobody else before the copies from and to it have ended; on a CPU nothing is copied.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

ALIGN = 16
"""Bytes at whose multiples a packed array begins: kernels are compiled for it."""


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A contiguous array as a tensor there, in order on the current stream."""
    host = torch.from_numpy(values)
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def packed(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Contiguous arrays as tensors there, by one copy in order on the current stream."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    starts = [0]
    for array in arrays:
        starts.append(starts[-1] + -(-array.nbytes // ALIGN) * ALIGN)
    block = np.zeros(starts[-1], np.uint8)
    for array, start in zip(arrays, starts, strict=False):
        block[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    return unpacked(to_device(block, device), arrays, starts)


def unpacked(block: Tensor, arrays: Sequence[np.ndarray], starts: Sequence[int]) -> list[Tensor]:
    """Views of a packed block of bytes, in the arrays' shapes and types."""
    return [
        block[start : start + array.nbytes]
        .view(torch.from_numpy(array[:0]).dtype)
        .view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]


def to_host(values: Tensor) -> Callable[[], list[float]]:
    """Begin the copy of [n] to the host; the result waits for it and for nothing behind it."""
    if values.device.type == "cpu":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return wait
