"""From the codes of other methods of quantisation to numbers. Knows formulas, no files or names.

Codes come row by row, as they are read: nothing but the result is ever held as a whole.
"""

import math
from collections.abc import Callable, Iterable
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
    row_groups: torch.Tensor | None = None,
    column_groups: torch.Tensor | None = None,
) -> None:
    """(code − zero) · scale, in the dtype of `scales`, rounded to that of `target` and put there.

    codes          [n, width] each, the rows of `target` in order; any dtype of numbers
    scales         `grid.shape` of `target`, a float
    target         [out, width]
    zeros          as scales, whole numbers; None: 0
    row_groups     [out], which row of `scales` each row has; None: the grid's
    column_groups  [width], as much of columns
    """
    if row_groups is None:
        row_groups = torch.arange(len(target)) // grid.rows
    at = 0
    for part in codes:
        own = row_groups[at : at + len(part)]
        numbers = _numbers(part, scales.dtype)
        if zeros is not None:
            _spread(numbers, zeros[own].to(scales.dtype), grid, column_groups, torch.Tensor.sub_)
        _spread(numbers, scales[own], grid, column_groups, torch.Tensor.mul_)
        target[at : at + len(part)] = numbers
        at += len(part)


def _numbers(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes of whole numbers or FP8 as numbers of `dtype`; FP8 by a table, which is faster."""
    if codes.dtype != torch.float8_e4m3fn:
        return codes.to(dtype)
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).to(dtype)
    places = codes.view(torch.uint8).reshape(-1).to(torch.int32)
    return table.index_select(0, places).view(codes.shape)


def _spread(
    numbers: torch.Tensor,
    values: torch.Tensor,
    grid: Grid,
    column_groups: torch.Tensor | None,
    change: Callable[[torch.Tensor, torch.Tensor], object],
) -> None:
    """Change numbers [n, width] in place by the value [n, groups] of each one's row and group."""
    if column_groups is not None:
        change(numbers, values[:, column_groups])
        return
    width = numbers.shape[1]
    whole = width // grid.columns
    inside = numbers[:, : whole * grid.columns].unflatten(1, (whole, grid.columns))
    change(inside, values[:, :whole, None])
    if width % grid.columns:
        change(numbers[:, whole * grid.columns :], values[:, whole:])


def microscaled(
    blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Two codes of E2M1 a byte, the first in the low half, times a power of two: [rows, width].

    blocks  uint8 [rows, width / 2]
    scales  uint8 [rows, width / 32]
    dtype   bf16 and fp32 hold every product as it is
    Raises ValueError where a scale is NaN.
    """
    if bool((scales == _NAN).any()):
        raise ValueError("a scale is NaN")
    signed = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    byte = torch.arange(256)
    pairs = torch.stack((signed[byte & 15], signed[byte >> 4]), dim=1).to(torch.bfloat16)
    table = pairs.view(torch.int32).view(-1)  # a pair is one element, which is faster
    powers = torch.tensor([2.0 ** (code - _BIAS) for code in range(_NAN)])
    numbers = table.index_select(0, blocks.reshape(-1).to(torch.int32)).view(torch.bfloat16)
    factors = powers.index_select(0, scales.reshape(-1).to(torch.int32))[:, None]
    numbers = numbers.view(len(factors), MX_BLOCK)
    if dtype == torch.bfloat16:
        numbers.mul_(factors.to(dtype))
    else:
        numbers = (numbers.to(torch.float32) * factors).to(dtype)
    return numbers.view(len(blocks), -1)


def unsigned(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers that lie one after the other in words, the first in the lowest bits: uint8
    [rows, columns · 32 / bits].

    words  int32 [rows, columns]
    bits   4 or 8
    """
    parts = words.contiguous().view(torch.uint8)
    if bits == 4:
        parts = torch.stack((parts & 15, parts >> 4), dim=-1).view(len(words), -1)
    return parts


def unpacked(words: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """The first `width` of such numbers, each stored plus half its range: int8 [rows, width].

    words  int32 [rows, ⌈width · bits / 32⌉]
    """
    return (unsigned(words, bits)[:, :width] - (1 << (bits - 1))).view(torch.int8)
