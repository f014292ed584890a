"""A plain weight once more, in codes of one byte: they tell which of its products are not among a
row's largest, in half the time that reading the weight takes. Knows weights; no sites."""

import ctypes
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fader_adapters.kernels.native.library import (
    CODES,
    MESSAGES,
    ScreenStruct,
    WantedStruct,
    library,
)
from fader_adapters.kernels.native.panels import PANEL, PanelStore
from fader_adapters.kernels.native.plain import PlainPanels
from fader_adapters.kernels.native.threads import threads
from fader_adapters.kernels.nf4 import BLOCK

MOST = 128
"""Outputs that are worth looking for."""
COLDEST, HOTTEST = 0.01, 100.0
"""Between these draws from all outputs are foreseen."""
ROWS = 8
"""SCREEN_ROWS of csrc/screen.h: calls with more leave nothing out."""
NUCLEUS_ROWS = 4
"""Rows, beyond which codes take as long as the weight itself, nearly: what a nucleus needs of that
comes on top."""
_LEVELS = 6
"""How patient at most: 63 tries that could be are left out for each that is made."""
_NOT_FINITE = -3
_ONE = 2**44
"""What the likeliest token weighs."""
_EVERYWHERE = 1e31
"""Farther than bounded outputs lie from each other."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of a row of outputs."""

    count: int = 1
    """How many of the largest, 1 to MOST, equal ones included."""
    heat: float = 0.0
    """What a token is drawn at: with a key from all, else from those alone (see `draw`); 0: not."""
    key: int | None = None
    min_p: float = 0.0
    """With a key: of those drawn from."""
    top_p: float = 1.0
    """With a key: of all."""

    def struct(self) -> WantedStruct:
        least = max(1, math.ceil(self.min_p * _ONE))
        given = WantedStruct(
            keep=self.count, heat=self.heat, reach=_EVERYWHERE, top_p=self.top_p, least=least
        )
        if self.key is not None:
            given.race, given.key = 1, self.key
        if self.min_p:
            given.reach = given.heat * math.log(_ONE / least)
        return given


def _saved(rows: int, share: float) -> float:
    """Of a computation of all, about, where a share of the panels was computed beside all codes;
    as `python -m bench.sampling --layers` measures it."""
    return 0.45 - 0.08 * rows - share


class Patience:
    """Whether a way that saves at times, and else costs, is worth another try. Counts tries: where
    they cost more than they saved of late, each that costs doubles how many are passed over."""

    def __init__(self) -> None:
        self._credit, self._level, self._wait = 0.0, 0, 0

    def tries(self) -> bool:
        """Whether now; asked once before each try that could be."""
        self._wait -= 1
        return self._wait < 0

    def learn(self, saved: float) -> None:
        """What a try led to; below 0: it cost."""
        self._credit = max(-1.0, min(1.0, self._credit + saved))
        if self._credit >= 0:
            self._level = 0
        elif saved < 0:
            self._level = min(self._level + 1, _LEVELS)
        self._wait = 2**self._level - 1


class Screen:
    """Codes of panels, and what sites over those may leave out.

    While it is `keeping` what is wanted of up to eight rows, fp32 outputs without deltas of as many
    have all that may be among it exactly; what is smaller may be -inf. A row that is drawn with
    top_p may have the token that is drawn alone, and -inf else.
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, panels: int) -> None:
        """codes: int8 [P, k/2, 32, 2]; scales: fp32 [P, k/64, 32], P = panels"""
        self._keep, self._panels = (codes, scales), panels
        self._struct = ScreenStruct(codes=codes.data_ptr(), scales=scales.data_ptr())
        self._patience = Patience()

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
        return cls(codes, scales, count)

    @contextmanager
    def keeping(self, rows: Sequence[Wanted]) -> Iterator[None]:
        """For calls of this thread, while no other calls: of these rows, in order, no more is
        wanted. Calls with another number of rows leave nothing out, nor do those with top_p for
        some time after it did not pay."""
        assert all(0 < row.count <= MOST for row in rows)
        assert all(row.key is None or COLDEST <= row.heat <= HOTTEST for row in rows)
        nuclei = any(row.key is not None and row.top_p < 1 for row in rows)
        if nuclei and (len(rows) > NUCLEUS_ROWS or not self._patience.tries()):
            yield
            return
        given = (WantedStruct * len(rows))(*(row.struct() for row in rows))
        self._struct.rows, self._struct.count, self._struct.computed = given, len(rows), -1
        try:
            yield
        finally:
            self._struct.count = 0
        if self._struct.computed >= 0:
            self._patience.learn(_saved(len(rows), self._struct.computed / self._panels))

    @property
    def address(self) -> int:
        return ctypes.addressof(self._struct)

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return sum(tensor.nbytes for tensor in self._keep)
