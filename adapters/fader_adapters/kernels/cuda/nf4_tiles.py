"""NF4 weights in the order in which a GPU kernel reads them. Knows layout, not arithmetic."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fader_adapters.kernels.cuda.nf4_configs import TILE_ROWS as TILE
from fader_adapters.kernels.nf4 import BLOCK, Nf4Weight, check_width

HALF = BLOCK // 2
"""Bytes of one row of a tile."""


PART = 4 << 20
"""Weights that are brought into tiles at a time."""


@dataclass(frozen=True, eq=False)
class Nf4Tiles:
    """A weight W [out_features, in_features] cut into tiles of 128 rows and 64 columns.

    codes   uint8 [⌈out/128⌉, in/64, 128, 32]  byte j of a row holds the tile's columns j (high
            nibble) and j + 32 (low nibble), so that both halves of x are read without a stride
    scales  float32 [⌈out/128⌉, in/64, 128]    one absmax a row of a tile
    Rows past out_features are zero bytes with scale zero; no result reads them. The matrices of a
    stack follow one another, each in whole tiles of its own.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    out_features: int
    """Of one matrix."""
    in_features: int

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def blocks(self) -> int:
        """Blocks of 64 columns in a row."""
        return self.in_features // BLOCK

    @property
    def each(self) -> int:
        """Tiles of 128 rows in one matrix."""
        return -(-self.out_features // TILE)


def tile(weights: Sequence[Nf4Weight]) -> Nf4Tiles:
    """Copy weights, stacked by rows, into tiles on their own device. Raises BaseUnsupported when
    in_features is not a multiple of 64."""
    shape = (1, sum(w.out_features for w in weights), weights[0].in_features)
    return tile_stack(weights, shape)


def tile_stack(parts: Iterable[Nf4Weight], shape: tuple[int, int, int]) -> Nf4Tiles:
    """Copy a stack (matrices, out, in) into tiles, given as rows of the matrix
    [matrices · out, in] in order, some at a time; each part is done with before the next is asked
    for.

    Beside the copy it takes a few times PART bytes. Raises BaseUnsupported when in is not a
    multiple of 64.
    """
    matrices, out, width = shape
    check_width(width)
    tiles, at = None, 0
    for part in parts:
        tiles = _blank(shape, part.packed.device) if tiles is None else tiles
        step = max(1, PART // width)
        for start in range(0, part.out_features, step):
            some = part.rows(start, min(start + step, part.out_features))
            _place(tiles, some, at + start)
        at += part.out_features
    assert tiles is not None
    assert at == matrices * out
    return tiles


def _blank(shape: tuple[int, int, int], device: torch.device) -> Nf4Tiles:
    matrices, out, width = shape
    size = (matrices * -(-out // TILE), width // BLOCK, TILE)
    codes = torch.zeros(*size, HALF, dtype=torch.uint8, device=device)
    scales = torch.zeros(size, dtype=torch.float32, device=device)
    return Nf4Tiles(codes, scales, out, width)


def _place(tiles: Nf4Tiles, rows: Nf4Weight, at: int) -> None:
    """Write rows that begin at `at` of the matrix [matrices · out, in]."""
    count, out = rows.out_features, tiles.out_features
    row = torch.arange(at, at + count, device=rows.packed.device)
    matrix, own = row // out, row % out
    where = (matrix * tiles.each + own // TILE, slice(None), own % TILE)
    tiles.codes[where] = _halves(rows.packed.view(count, tiles.blocks, HALF))
    tiles.scales[where] = rows.absmax.view(count, tiles.blocks)


def _halves(pairs: torch.Tensor) -> torch.Tensor:
    """Bytes of columns (2j, 2j + 1) [..., 32] to bytes of columns (j, j + 32)."""
    nibbles = torch.stack((pairs >> 4, pairs & 15), dim=-1).flatten(-2)
    return nibbles[..., :HALF] << 4 | nibbles[..., HALF:]
