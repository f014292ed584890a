"""Base linears over NF4 on a GPU: who multiplies is chosen once, at construction, by shape and
machine. Knows weights and rows, not sites, deltas or steps."""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch

from fader_adapters.errors import KernelUnavailable
from fader_adapters.kernels.cuda import nf4_configs as configs
from fader_adapters.kernels.cuda.machines import Arch, codes_arch
from fader_adapters.kernels.cuda.nf4_bitsandbytes import BitsandbytesLinear
from fader_adapters.kernels.cuda.nf4_codes import CODES, table_words
from fader_adapters.kernels.cuda.nf4_kernels import nf4_dense, nf4_gemm, nf4_sum
from fader_adapters.kernels.cuda.nf4_tiles import TILE, Nf4Tiles, tile
from fader_adapters.kernels.dense import ByRows
from fader_adapters.kernels.nf4 import Nf4Weight

WORDS = {f"w{i}": word for i, word in enumerate(table_words())}
"""Arguments of a kernel that looks codes up in registers."""


Way = Literal["rows", "fused", "pieces"]
"""How a backend has its linears multiply. fused: by the fused kernel, for any number of rows.
pieces: dequantised, PIECE rows at a time, so that a row's bits do not depend on the others. rows:
by the number of rows, whichever is quicker."""

PIECE = 256
"""Rows of one product over dequantised weights; missing ones are padded."""

SCRATCH_BYTES = 256 << 20
"""A whole weight of most bases: fewer launches and wider products than by parts of it."""


class Scratch:
    """The buffer that dequantised weights pass through, one for all linears of a backend.

    Taken once and never moved, so a captured graph may hold its address. Calls that share it must
    follow one another on one stream.
    """

    def __init__(self, device: torch.device, nbytes: int = SCRATCH_BYTES) -> None:
        self.table = torch.tensor(CODES, dtype=torch.float32, device=device)
        """[16] fp32, the codes."""
        self.way: Way = "rows"
        self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def most_rows(self, width: int, dtype: torch.dtype) -> int:
        """Rows of `width` that fit, a multiple of the tile. Raises KernelUnavailable for none."""
        rows = self.nbytes // (width * dtype.itemsize) // TILE * TILE
        if not rows:
            raise KernelUnavailable(
                f"a scratch of {self.nbytes} bytes does not hold {TILE} rows of {width} weights "
                f"in {dtype}; give the backend a larger one"
            )
        return rows

    def take(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """[rows, width] of whatever the last user left there."""
        return self._buffer[: rows * width * dtype.itemsize].view(dtype).view(rows, width)


class Nf4Linear(ByRows):
    """W in tiles, 0.5625 byte a weight: x·Wᵀ + b by the fused kernel, or through the scratch.

    Rows of bf16 (on a CPU, in Triton's interpreter, of fp32) go to the fused kernel or to chunks of
    dequantised weights and torch.mm as the scratch's `way` says, by itself the first up to
    configs.FUSED_ROWS rows; other dtypes always to the second. Either way alone gives a row bits
    that do not depend on the other rows or their number; "rows" does so up to configs.DECODE_ROWS.
    A call allocates its output and its fp32 planes, from the caching allocator; it never waits
    for the device and takes nothing that changes between calls but x.
    """

    def __init__(
        self, weights: Sequence[Nf4Weight], bias: torch.Tensor | None, scratch: Scratch
    ) -> None:
        """weights are stacked by rows and copied; bias [Σ out] is kept. Raises BaseUnsupported."""
        self.tiles = tile(weights)
        self.bias = bias
        self.out_features = self.tiles.out_features
        self.in_features = self.tiles.in_features
        self._scratch = scratch
        self._arch: Arch = checked_arch(self.tiles.codes.device) or 80
        self._launch: configs.Launch | None = None
        self._split_blocks = configs.split_blocks(self._arch, self.out_features, self.in_features)

    def relaunched(self, *, splits: int, launch: configs.Launch) -> "Nf4Linear":
        """The same weight by another fused launch than the tables choose, to measure it."""
        other = copy.copy(self)
        other._launch, other._split_blocks = launch, -(-self.tiles.blocks // splits)
        return other

    @property
    def splits(self) -> int:
        """Planes that the fused kernel writes; one means it writes the result itself."""
        return -(-self.tiles.blocks // self._split_blocks)

    @property
    def plain_dtype(self) -> None:
        return None

    @property
    def nbytes(self) -> int:
        return self.tiles.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] → [T, out] in x's dtype, summed in fp32 and rounded once."""
        out = torch.empty(x.shape[0], self.out_features, dtype=x.dtype, device=x.device)
        if not x.shape[0]:
            return out
        if self._fuses(x):
            return self.fused(x, out)
        if self._scratch.way == "rows":
            return self.through_scratch(x, out)
        padded = -(-x.shape[0] // PIECE) * PIECE
        whole = x.new_zeros(padded, x.shape[1])
        whole[: x.shape[0]] = x
        products = torch.empty(padded, self.out_features, dtype=x.dtype, device=x.device)
        return self.through_scratch(whole, products, piece=PIECE)[: x.shape[0]]

    def _fuses(self, x: torch.Tensor) -> bool:
        """Whether the fused kernel multiplies x."""
        rows = {"rows": x.shape[0], "fused": 1, "pieces": configs.FUSED_ROWS + 1}[self._scratch.way]
        method = configs.method(self._arch, self.out_features, self.in_features, rows)
        return method != "scratch" and x.dtype == (
            torch.float32 if interpreted(x) else torch.bfloat16
        )

    def fused(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write x·Wᵀ + b to `out` [T, out], contiguous, by the fused kernel: bf16; fp32 on CPU."""
        assert out.is_contiguous()
        planes = self._planes(x)
        if planes is None:
            self._gemm(x, out, self.bias)
        else:
            add_planes(planes, self.bias, out)
        return out

    def planes(self, x: torch.Tensor) -> torch.Tensor | None:
        """What `add_planes` makes the result of: float32 [splits, T, out] without bias, for a
        caller with more to add. None where x [T, in] goes another way, or in one part.
        """
        return self._planes(x) if x.shape[0] and self._fuses(x) else None

    def _planes(self, x: torch.Tensor) -> torch.Tensor | None:
        if self.splits == 1:
            return None
        shape = (self.splits, x.shape[0], self.out_features)
        planes = torch.empty(shape, dtype=torch.float32, device=x.device)
        self._gemm(x, planes, None)
        return planes

    def _gemm(self, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None) -> None:
        if x.stride(1) != 1:
            x = x.contiguous()
        rows, tiles = x.shape[0], self.tiles
        config = self._launch or configs.launch(self._arch, rows)
        grid = (-(-tiles.out_features // config.bn), self.splits, -(-rows // config.bm))
        nf4_gemm[grid](
            x,
            tiles.codes,
            tiles.scales,
            out if bias is None else bias,
            self._scratch.table,
            out,
            rows=rows,
            n=tiles.out_features,
            blocks=tiles.blocks,
            split_blocks=self._split_blocks,
            x_stride=x.stride(0) if rows > 1 else self.in_features,
            **WORDS,
            **configs.gemm_constants(config, bias=bias is not None, exact=interpreted(x)),
            **options(config.warps, config.stages),
        )

    def through_scratch(
        self, x: torch.Tensor, out: torch.Tensor, *, piece: int | None = None
    ) -> torch.Tensor:
        """Write x·Wᵀ + b to `out` [T, out] over dequantised chunks of rows; W is rounded once.

        piece  rows of x multiplied at a time, a divisor of T; by default all of them
        """
        step = self._scratch.most_rows(self.in_features, x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        for first in range(0, self.out_features, step):
            last = min(first + step, self.out_features)
            weight = self._scratch.take(last - first, self.in_features, x.dtype)
            dequantise(self.tiles, weight, self._scratch.table, first=first)
            parts = zip(x.split(piece or len(x)), out.split(piece or len(x)), strict=True)
            for part, result in parts:
                if bias is None:
                    torch.mm(part, weight.T, out=result[:, first:last])
                else:
                    torch.addmm(bias[first:last], part, weight.T, out=result[:, first:last])
        return out

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """W [out, in]: code · absmax in fp32, rounded once."""
        out = torch.empty(
            self.out_features, self.in_features, dtype=dtype, device=self.tiles.codes.device
        )
        dequantise(self.tiles, out, self._scratch.table)
        return out

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """W[start:stop] in fp32, on the device."""
        first = start // TILE * TILE
        shape = (stop - first, self.in_features)
        out = torch.empty(shape, dtype=torch.float32, device=self.tiles.codes.device)
        dequantise(self.tiles, out, self._scratch.table, first=first)
        return out[start - first :]


def linear(
    weights: Sequence[Nf4Weight], bias: torch.Tensor | None, scratch: Scratch
) -> Nf4Linear | BitsandbytesLinear:
    """The base linear of this shape on the weights' device; the one choice between the two."""
    n, k = sum(w.out_features for w in weights), weights[0].in_features
    if configs.method(checked_arch(weights[0].packed.device), n, k, 1) == "bitsandbytes":
        return BitsandbytesLinear(weights, bias, scratch)
    return Nf4Linear(weights, bias, scratch)


def add_planes(planes: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out [T, n] = Σ planes [S, T, n] in ascending order + bias [n], rounded once. Contiguous."""
    splits, rows, n = planes.shape
    nf4_sum[(-(-n // configs.SUM_COLUMNS), rows)](
        planes,
        planes if bias is None else bias,
        out,
        rows,
        n,
        **configs.sum_constants(splits, bias=bias is not None),
        **options(configs.SMALL_WARPS, 1),
    )


def dequantise(tiles: Nf4Tiles, out: torch.Tensor, table: torch.Tensor, *, first: int = 0) -> None:
    """Write rows first.. of W to `out` [rows, in], contiguous, any float dtype.

    first  a multiple of 128
    table  [16] fp32, the codes
    """
    assert first % TILE == 0
    assert out.is_contiguous()
    grid = (-(-out.shape[0] // configs.DENSE_ROWS), tiles.blocks)
    nf4_dense[grid](
        tiles.codes,
        tiles.scales,
        table,
        out,
        first + out.shape[0],
        tiles.blocks,
        first // TILE,
        **configs.dense_constants(),
        **options(configs.SMALL_WARPS, 1),
    )


def interpreted(x: torch.Tensor) -> bool:
    """Whether kernels over `x` run in Triton's interpreter, which multiplies in fp32 only."""
    return not x.is_cuda


def checked_arch(device: torch.device) -> Arch | None:
    """The tables for a device, those of sm_80 for a CPU, where Triton interprets; None where the
    fused kernels were never compiled and checked."""
    if device.type != "cuda":
        return 80
    capability = torch.cuda.get_device_capability(device)
    return codes_arch(capability)


def options(warps: int, stages: int) -> dict[str, Any]:
    """Options of a launch, which are no parameters of the kernel."""
    return {"num_warps": warps, "num_stages": stages}
