"""Stacks of experts in NF4 on a GPU. Knows weights and pairs; no routers, models or deltas."""

from collections.abc import Iterable

import torch

from fader_adapters.kernels.cuda import nf4_expert_configs as configs
from fader_adapters.kernels.cuda.machines import Arch
from fader_adapters.kernels.cuda.nf4 import (
    WORDS,
    Scratch,
    checked_arch,
    dequantise,
    interpreted,
    options,
)
from fader_adapters.kernels.cuda.nf4_expert_kernels import nf4_experts
from fader_adapters.kernels.cuda.nf4_tiles import TILE, tile_stack
from fader_adapters.kernels.dense import ByRows
from fader_adapters.kernels.nf4 import Nf4Weight
from fader_adapters.kernels.routing import Routing


class CudaNf4Stack(ByRows):
    """W of every expert in tiles, 0.5625 byte a weight: all pairs' products in one launch.

    Pairs of bf16 on sm_80 and sm_90 are multiplied by the kernel's tables; others by the same
    kernel with codes gathered from memory, in their own dtype, in small tiles: fp16, bf16 on newer
    machines and, without matrix units, fp32. Any number of pairs goes one way, so a pair's bits
    depend on the pair alone. The host reads nothing of the routing but its shapes; a call
    allocates its output, from the caching allocator, and can be captured. Interpreted and compiled
    so far, never run on a GPU.
    """

    plain_dtype = None

    def __init__(
        self,
        rows: Iterable[Nf4Weight],
        shape: tuple[int, int, int],
        bias: torch.Tensor | None,
        scratch: Scratch,
    ) -> None:
        """rows of the matrix [experts · out, in] in order, some at a time, are copied; shape
        (experts, out, in); bias [experts, out] is kept. Raises BaseUnsupported."""
        self.tiles = tile_stack(rows, shape)
        self.experts = shape[0]
        self.bias = bias
        self._table = scratch.table
        self._arch: Arch | None = checked_arch(self.tiles.codes.device)

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return self.tiles.nbytes

    @property
    def resident(self) -> tuple[torch.Tensor, ...]:
        return self.tiles.codes, self.tiles.scales

    def grouped(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Each pair's product with its expert's weight, x [pairs, in] in the routing's order →
        [pairs, out] in x's dtype; bias added and rounded once."""
        tiles, pairs = self.tiles, x.shape[0]
        n = tiles.out_features
        y = torch.empty(pairs, n, dtype=x.dtype, device=x.device)
        if not pairs:
            return y
        if x.stride(1) != 1:
            x = x.contiguous()
        arch = self._arch
        exact = interpreted(x) or arch is None or x.dtype != torch.bfloat16
        if arch is None or (exact and not interpreted(x)):
            config = configs.EXACT[x.element_size()]
        else:
            config = configs.launch(arch, pairs, self.experts, n)
        bias = None if self.bias is None else self.bias.data
        assert bias is None or bias.is_contiguous()
        grid = (-(-n // config.bn), configs.most_tiles(pairs, self.experts, config.bm))
        nf4_experts[grid](
            x,
            tiles.codes,
            tiles.scales,
            y if bias is None else bias,
            self._table,
            routing.ends,
            y,
            experts=self.experts,
            n=n,
            blocks=tiles.blocks,
            x_stride=x.stride(0) if pairs > 1 else tiles.in_features,
            **WORDS,
            **configs.constants(config, bias=bias is not None, exact=exact),
            **options(config.warps, config.stages),
        )
        return y

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the matrix [experts · out, in] in fp32, on the device."""
        tiles, parts = self.tiles, []
        out = tiles.out_features
        for expert in range(start // out, -(-stop // out)):
            low, high = max(start - expert * out, 0), min(stop - expert * out, out)
            first = low // TILE * TILE
            shape = (high - first, tiles.in_features)
            part = torch.empty(shape, dtype=torch.float32, device=tiles.codes.device)
            dequantise(tiles, part, self._table, first=expert * tiles.each * TILE + first)
            parts.append(part[low - first :])
        return torch.cat(parts)
