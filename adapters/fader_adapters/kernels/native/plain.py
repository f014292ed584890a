"""Unquantised weights in the layout the kernels stream: panels of 32 columns. Knows weights; no
adapters, no rows of a step."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fader_adapters.kernels.native import checks
from fader_adapters.kernels.native.library import CODES, check, library
from fader_adapters.kernels.native.ops import Kind, Op, Tape
from fader_adapters.kernels.native.panels import PANEL, PanelStore, whole_panels
from fader_adapters.kernels.native.threads import threads
from fader_adapters.kernels.nf4 import BLOCK


@dataclass(frozen=True, slots=True)
class PlainPanels:
    """W [n, k] in bf16 or fp32 as panels [P, k, 32] of its dtype, P = ceil(n / 32): the same values
    and, but for the last panel, the same bytes in another order."""

    panels: Tensor
    n: int
    k: int

    @staticmethod
    def pack(weight: Tensor, *, store: PanelStore | None = None) -> "PlainPanels":
        """Copy a contiguous [n, k] weight; k must be a multiple of 64. Raises: TypeError,
        ValueError."""
        checks.tensor("weight", weight, checks.FLOATS, shape=(None, None))
        n, k = weight.shape
        panels = PlainPanels.blank(n, k, weight.dtype, store=store)
        panels.fill([weight])
        return panels

    @staticmethod
    def blank(
        n: int, k: int, dtype: torch.dtype, *, store: PanelStore | None = None
    ) -> "PlainPanels":
        """Panels that nothing was written to yet. Raises: ValueError."""
        if not n or not k or k % BLOCK:
            raise ValueError(f"weight must be [n, k] with k a multiple of {BLOCK}, got {[n, k]}")
        count = -(-n // PANEL)
        room = (store or PanelStore(0)).take(count * PANEL * k * dtype.itemsize)
        return PlainPanels(room.view(dtype).view(count, k, PANEL), n, k)

    def fill(self, parts: Iterable[Tensor]) -> None:
        """Write all rows, some contiguous [m, k] at a time, as Nf4Panels.fill does. Raises:
        TypeError, ValueError."""
        at = 0
        for group in whole_panels(parts, len, self.n):
            rows = group[0] if len(group) == 1 else torch.cat(group)
            checks.tensor("weight", rows, (self.dtype,), shape=(None, self.k))
            panels = self.panels[at // PANEL :]
            code = library().fader_pack(
                len(rows), self.k, rows.data_ptr(), CODES[self.dtype], panels.data_ptr(), threads()
            )
            check(code, "pack")
            at += len(rows)

    @property
    def dtype(self) -> torch.dtype:
        return self.panels.dtype

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return self.panels.nbytes

    def rows(self, start: int, stop: int) -> "PlainPanels":
        """Rows `start`, a multiple of 32, to `stop` of W, as a view."""
        assert start % PANEL == 0
        return PlainPanels(self.panels[start // PANEL : -(-stop // PANEL)], stop - start, self.k)

    def take(self, index: Tensor, *, tape: Tape | None = None) -> Tensor:
        """Rows of W: index int64 of any shape -> [..., k]. Raises: TypeError, ValueError (an index
        outside [0, n) among others)."""
        checks.tensor("index", index, (torch.int64,))
        out = torch.empty((*index.shape, self.k), dtype=self.dtype)
        code = library().fader_panel_rows(
            self.n,
            self.k,
            self.panels.data_ptr(),
            CODES[self.dtype],
            index.data_ptr(),
            index.numel(),
            out.data_ptr(),
        )
        check(code, "take")
        if tape is not None:
            op = Op(kind=Kind.GATHER, map=1, dtype=CODES[self.dtype], n=self.n, k=self.k)
            op.size[0] = index.numel()
            tape.note(op, self.panels, y=index, out=out, keep=self.panels)
        return out

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [n, k] in `dtype`, by default its own; on the caller's thread."""
        return self.take(torch.arange(self.n)).to(dtype or self.dtype)
