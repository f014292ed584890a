"""From the codes of other methods of quantisation to numbers. Knows formulas, no files and no names.

Codes come row by row, as they are read: nothing but the result is ever held as a whole.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What its codes are without the fourth bit, the sign."""
MX_BLOCK = 32
"""Weights that share one scale in the OCP's microscaling formats."""
_BIAS, _NAN = 127, 0xFF
"""Of E8M0, the exponents that are scales there."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Which scale a weight has: that of the block its row and column are in. The last blocks may
    be smaller than others."""

    rows: int
    """Of a block."""
    columns: int

    def shape(self, out: int, width: int) -> tuple[int, int]:
        """Of the scales of a weight [out, width]."""
        return math.ceil(out / self.rows), math.ceil(width / self.columns)


def scaled(
    codes: Iterable[torch.Tensor],
    scales: torch.Tensor,
    grid: Grid,
    target: torch.Tensor,
    *,
    zeros: torch.Tensor | None = None,
    column_groups: torch.Tensor | None = None,
) -> None:
    """(code − zero) · scale, in the dtype of `scales`, rounded to that of `target` and put there.

    codes          [n, width] each, the rows of `target` in order; any dtype of numbers
    scales         `grid.shape` of `target`, a float
    target         [out, width]
    zeros          as scales, whole numbers; None: 0
    column_groups  [width], which column of `scales` each column has; None: the grid's
    """
    out, width = target.shape
    row_blocks = torch.arange(out) // grid.rows
    if column_groups is None:
        column_groups = torch.arange(width) // grid.columns

    def spread(values: torch.Tensor, at: int, count: int) -> torch.Tensor:
        own = values[row_blocks[at : at + count]].to(scales.dtype)
        return own if values.shape[1] == 1 else own[:, column_groups]

    at = 0
    for part in codes:
        numbers = part.to(scales.dtype)
        if zeros is not None:
            numbers -= spread(zeros, at, len(part))
        target[at : at + len(part)] = numbers.mul_(spread(scales, at, len(part)))
        at += len(part)


def microscaled(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Two codes of E2M1 a byte, the first in the low half, times a power of two: fp32 [rows, width].

    blocks  uint8 [rows, width / 2]
    scales  uint8 [rows, width / 32]
    Raises ValueError where a scale is NaN.
    """
    if bool((scales == _NAN).any()):
        raise ValueError("a scale is NaN")
    signed = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    byte = torch.arange(256)
    pairs = torch.stack((signed[byte & 15], signed[byte >> 4]), dim=1)
    powers = torch.tensor([2.0 ** (code - _BIAS) for code in range(_NAN)])
    numbers = pairs.index_select(0, blocks.reshape(-1).to(torch.int32))
    factors = powers.index_select(0, scales.reshape(-1).to(torch.int32))
    return numbers.view(len(factors), MX_BLOCK).mul_(factors[:, None]).view(len(blocks), -1)


def unpacked(words: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Whole numbers that lie one after the other in words, the first in the lowest bits: int8
    [rows, width].

    words  int32 [rows, ⌈width · bits / 32⌉], of numbers that half their range was added to
    bits   4 or 8
    """
    parts = words.contiguous().view(torch.uint8)
    if bits == 4:
        parts = torch.stack((parts & 15, parts >> 4), dim=-1).view(len(words), -1)
    return (parts[:, :width] - (1 << (bits - 1))).view(torch.int8)
