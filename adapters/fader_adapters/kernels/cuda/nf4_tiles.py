"""NF4 weights in the order in which a GPU kernel reads them. Knows layout, not arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fader_adapters.kernels.cuda.nf4_configs import TILE_ROWS as TILE
from fader_adapters.kernels.nf4 import BLOCK, Nf4Weight, check_width, stack

HALF = BLOCK // 2
"""Bytes of one row of a tile."""


@dataclass(frozen=True, eq=False)
class Nf4Tiles:
    """A weight W [out_features, in_features] cut into tiles of 128 rows and 64 columns.

    codes   uint8 [⌈out/128⌉, in/64, 128, 32]  byte j of a row holds the tile's columns j (high
            nibble) and j + 32 (low nibble), so that both halves of x are read without a stride
    scales  float32 [⌈out/128⌉, in/64, 128]    one absmax a row of a tile
    Rows past out_features are zero bytes with scale zero; no result reads them.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    out_features: int
    in_features: int

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def blocks(self) -> int:
        """Blocks of 64 columns in a row."""
        return self.in_features // BLOCK


def tile(weights: Sequence[Nf4Weight]) -> Nf4Tiles:
    """Copy weights, stacked by rows, into tiles on their own device.

    Works on few rows at a time: beside the copy it takes a few MB. Raises BaseUnsupported when
    in_features is not a multiple of 64.
    """
    width = weights[0].in_features
    check_width(width)
    rows, blocks, device = (
        sum(w.out_features for w in weights),
        width // BLOCK,
        weights[0].packed.device,
    )
    tiles = -(-rows // TILE)
    codes = torch.zeros(tiles, blocks, TILE, HALF, dtype=torch.uint8, device=device)
    scales = torch.zeros(tiles, blocks, TILE, dtype=torch.float32, device=device)
    for index in range(tiles):
        part = _rows(weights, index * TILE, min((index + 1) * TILE, rows))
        count = part.out_features
        codes[index, :, :count] = _halves(part.packed.view(count, blocks, HALF)).transpose(0, 1)
        scales[index, :, :count] = part.absmax.view(count, blocks).T
    return Nf4Tiles(codes, scales, rows, width)


def _rows(weights: Sequence[Nf4Weight], start: int, stop: int) -> Nf4Weight:
    """Rows start..stop of the stacked weights."""
    parts, first = [], 0
    for weight in weights:
        low, high = max(start - first, 0), min(stop - first, weight.out_features)
        if low < high:
            parts.append(weight.rows(low, high))
        first += weight.out_features
    return stack(parts)


def _halves(pairs: torch.Tensor) -> torch.Tensor:
    """Bytes of columns (2j, 2j + 1) [..., 32] to bytes of columns (j, j + 32)."""
    nibbles = torch.stack((pairs >> 4, pairs & 15), dim=-1).flatten(-2)
    return nibbles[..., :HALF] << 4 | nibbles[..., HALF:]
