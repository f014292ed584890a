"""A plain weight once more, in codes of one byte: they tell which of its products are not among a
row's largest, in half the time that reading the weight takes. Knows weights; no sites."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fader_adapters.kernels.native.library import CODES, MESSAGES, ScreenStruct, library
from fader_adapters.kernels.native.panels import PANEL, PanelStore
from fader_adapters.kernels.native.plain import PlainPanels
from fader_adapters.kernels.native.threads import threads
from fader_adapters.kernels.nf4 import BLOCK

MOST = 128
"""Outputs that are worth looking for."""
ROWS = 8
"""SCREEN_ROWS of csrc/screen.h: calls with more leave nothing out."""
_NOT_FINITE = -3


class Screen:
    """Codes of panels, and what sites over those may leave out.

    While it is `keeping` some of the largest, up to eight fp32 rows of outputs without deltas have
    all that may be among them exactly, equal ones included; what is smaller may be -inf.
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """codes: int8 [P, k/2, 32, 2]; scales: fp32 [P, k/64, 32]"""
        self._keep = codes, scales
        self._struct = ScreenStruct(codes=codes.data_ptr(), scales=scales.data_ptr())

    @classmethod
    def of(cls, panels: PlainPanels) -> "Screen | None":
        """None where a weight is not finite: nothing can be said of its products."""
        count = -(-panels.n // PANEL)
        store = PanelStore(0)
        codes = store.take(count * panels.k * PANEL).view(torch.int8)
        scales = store.take(count * panels.k // BLOCK * PANEL * 4).view(torch.float32)
        code = library().fader_screen_pack(
            panels.n,
            panels.k,
            panels.panels.data_ptr(),
            CODES[panels.dtype],
            codes.data_ptr(),
            scales.data_ptr(),
            threads(),
        )
        if code == _NOT_FINITE:
            return None
        assert not code, MESSAGES[code]
        return cls(codes, scales)

    @contextmanager
    def keeping(self, count: int, heats: Sequence[float] = ()) -> Iterator[None]:
        """For calls of this thread, while no other calls: only the `count` largest outputs of a row
        are wanted, 1 to MOST; heats: tokens are drawn from those alone at these (see `draw`)."""
        assert 0 < count <= MOST
        self._struct.coldest, self._struct.hottest = min(heats, default=0), max(heats, default=0)
        self._struct.keep = count
        try:
            yield
        finally:
            self._struct.keep = 0

    @property
    def address(self) -> int:
        return ctypes.addressof(self._struct)

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return sum(tensor.nbytes for tensor in self._keep)
