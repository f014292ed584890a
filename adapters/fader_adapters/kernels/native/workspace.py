"""Scratch memory that kernels borrow for the length of a call. One a thread: two calls must not
share it."""

import ctypes
from collections.abc import Callable

import torch

from fader_adapters.kernels.native.library import MESSAGES
from fader_adapters.kernels.native.threads import threads

_TOO_SMALL = -2


class Workspace:
    """A 64-byte aligned buffer that grows to the largest request and stays there."""

    def __init__(self, size: int = 0) -> None:
        self._need = ctypes.c_int64()
        self._grow(size)

    def _grow(self, size: int) -> None:
        self._buffer = torch.empty(size + 128, dtype=torch.uint8)
        start = self._buffer.data_ptr()
        self.pointer = (start + 63) & ~63
        self.size = size + 128 - (self.pointer - start)

    def __len__(self) -> int:
        """Bytes held."""
        return self._buffer.numel()

    def poison(self) -> None:
        """Fill with NaN, so that a test sees reads of what was never written."""
        self._buffer.fill_(0xFF)

    def call(self, function: Callable[..., int], what: str, *args: object) -> None:
        """`function(*args, scratch, size, need, threads)`, again with a larger buffer while it
        asks for one.

        Raises: ValueError when the kernel refuses its arguments.
        """
        code = _TOO_SMALL
        while code == _TOO_SMALL:
            need = ctypes.byref(self._need)
            code = function(*args, self.pointer, self.size, need, threads())
            if code == _TOO_SMALL:
                self._grow(self._need.value + self._need.value // 4)
        if code:
            raise ValueError(f"{what}: {MESSAGES.get(code, f'status {code}')}")
