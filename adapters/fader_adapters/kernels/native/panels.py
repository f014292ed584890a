"""NF4 weights in the layout the kernels stream: panels of 32 columns. Knows weights; no
adapters, no rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fader_adapters.kernels.native import checks
from fader_adapters.kernels.native.library import CODES, check, library
from fader_adapters.kernels.native.quantise import packed_bytes
from fader_adapters.kernels.native.threads import threads
from fader_adapters.kernels.nf4 import BLOCK

PANEL = 32

Part = TypeVar("Part")


def in_huge_pages(tensor: Tensor) -> None:
    """Ask for huge pages under a CPU tensor that is not written yet; a hint, never an error."""
    library().fader_advise_huge(tensor.data_ptr(), tensor.nbytes)


class PanelStore:
    """Memory for many weights in huge pages, which one weight alone is too small for: fewer page
    walks a step.

    Grows by chunks of address space; what no weight uses is never touched, so it costs nothing.
    Any tensor that is streamed gains by it: `store.take(nbytes).view(dtype).view(shape)`.
    """

    def __init__(self, chunk: int = 256 << 20) -> None:
        self._chunk = chunk
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """uint8 [size], 64-byte aligned, unset."""
        skip = -self._left.data_ptr() % 64 if self._left.numel() else 0
        if self._left.numel() < skip + size:
            self._left = torch.empty(max(self._chunk, size + 64), dtype=torch.uint8)
            in_huge_pages(self._left)
            skip = -self._left.data_ptr() % 64
        out = self._left[skip : skip + size]
        self._left = self._left[skip + size :]
        return out


def whole_panels(
    parts: Iterable[Part], rows_of: Callable[[Part], int], n: int
) -> Iterator[list[Part]]:
    """The parts of n rows in groups, each of which but the last fills panels of its own. Raises:
    ValueError (other than n rows)."""
    done, group, rows = 0, [], 0
    for part in parts:
        group.append(part)
        rows += rows_of(part)
        if done + rows > n:
            raise ValueError(f"parts must have {n} rows in all, got more")
        if rows % PANEL == 0 or done + rows == n:
            yield group
            done, group, rows = done + rows, [], 0
    if done != n:
        raise ValueError(f"parts must have {n} rows in all, got {done + rows}")


def _joined(parts: Sequence[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor, int]:
    packed = torch.cat([packed.reshape(-1) for packed, _, _ in parts])
    absmax = torch.cat([absmax.reshape(-1) for _, absmax, _ in parts])
    return packed, absmax, sum(n for _, _, n in parts)


@dataclass(frozen=True, slots=True)
class Nf4Panels:
    """W [n, k] as panels uint8 [P, k/2, 32] and scales fp32 [P, k/64, 32], P = ceil(n / 32):
    0.5625 byte a weight."""

    panels: Tensor
    scales: Tensor
    n: int
    k: int

    @staticmethod
    def from_bnb(
        packed: Tensor, absmax: Tensor, n: int, k: int, *, store: PanelStore | None = None
    ) -> "Nf4Panels":
        """Repack bitsandbytes' bytes (uint8, n*k/2 of them) and absmax (fp32 [n*k/64], not nested).

        Nothing of the inputs is kept. Raises: TypeError, ValueError (sizes; k must be a multiple
        of 64).
        """
        return Nf4Panels.stack([(packed, absmax, n)], k, store=store)

    @staticmethod
    def stack(
        parts: Sequence[tuple[Tensor, Tensor, int]], k: int, *, store: PanelStore | None = None
    ) -> "Nf4Panels":
        """One weight from several that share their input (q/k/v, gate/up): (packed, absmax, n)
        each, stacked by n.

        Raises: TypeError, ValueError.
        """
        if not parts:
            raise ValueError("parts must not be empty")
        total = sum(checks.positive("n", n) for _, _, n in parts)
        panels = Nf4Panels.blank(total, k, store=store)
        panels.fill(parts)
        return panels

    @staticmethod
    def blank(n: int, k: int, *, store: PanelStore | None = None) -> "Nf4Panels":
        """Panels that nothing was written to yet. Raises: TypeError, ValueError."""
        checks.positive("k", k)
        if k % BLOCK:
            raise ValueError(f"k must be a multiple of {BLOCK}, got {k}")
        count = -(-checks.positive("n", n) // PANEL)
        store = store or PanelStore(0)
        panels = store.take(count * k // 2 * PANEL).view(count, k // 2, PANEL)
        scales = store.take(count * k // BLOCK * PANEL * 4).view(torch.float32)
        return Nf4Panels(panels, scales.view(count, k // BLOCK, PANEL), n, k)

    def fill(self, parts: Iterable[tuple[Tensor, Tensor, int]]) -> None:
        """Write all rows, as `stack` takes them; each part is done with before the next is asked
        for, one that ends inside a panel with those that complete it. Raises: TypeError,
        ValueError."""
        at = 0
        for group in whole_panels(parts, lambda part: part[2], self.n):
            packed, absmax, rows = group[0] if len(group) == 1 else _joined(group)
            packed_bytes(packed, absmax, rows * self.k)
            first = at // PANEL
            code = library().fader_repack(
                rows,
                self.k,
                packed.data_ptr(),
                absmax.data_ptr(),
                self.panels[first:].data_ptr(),
                self.scales[first:].data_ptr(),
                threads(),
            )
            check(code, "Nf4Panels")
            at += rows

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return self.panels.nbytes + self.scales.nbytes

    def rows(self, start: int, stop: int) -> "Nf4Panels":
        """Columns `start`, a multiple of 32, to `stop` of y, as a view: rows of W."""
        assert start % PANEL == 0
        first, last = start // PANEL, -(-stop // PANEL)
        return Nf4Panels(self.panels[first:last], self.scales[first:last], stop - start, self.k)

    def dense(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """W [n, k] in `dtype` (bf16 or fp32), each value code * absmax rounded once. Raises:
        TypeError."""
        if dtype not in checks.FLOATS:
            raise TypeError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
        out = torch.empty((self.n, self.k), dtype=dtype)
        code = library().fader_panels_dense(
            self.n,
            self.k,
            self.panels.data_ptr(),
            self.scales.data_ptr(),
            out.data_ptr(),
            CODES[dtype],
            threads(),
        )
        check(code, "dense")
        return out
