"""Paged keys and values, one pair of tensors a layer. Knows shapes and bytes, not sequences."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

_PAGE = 4096
"""Bytes; no page is smaller."""
_TOUCHED = 2 << 20
"""Bytes of a tensor between two looks at the clock."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer stores per token."""

    kv_heads: int
    head_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class LayerCache:
    """k [blocks, block, kv_heads, head_dim] and v [blocks, block, kv_heads, value_dim]."""

    k: torch.Tensor
    v: torch.Tensor


class KVCache:
    """Every attention layer's paged cache; block 0 is the null block, zero until a row that has no
    block of its own writes it. Nothing of it reaches a result."""

    def __init__(
        self,
        shapes: Mapping[nn.Module, LayerShape],
        *,
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.device = device
        self._layers: dict[nn.Module, LayerCache] = {}
        for module, shape in shapes.items():
            place = (blocks, block_size, shape.kv_heads)
            k = torch.empty(*place, shape.head_dim, dtype=dtype, device=device)
            v = torch.empty(*place, shape.value_dim, dtype=dtype, device=device)
            k[0].zero_()
            v[0].zero_()
            self._layers[module] = LayerCache(k, v)

    def __getitem__(self, module: nn.Module) -> LayerCache:
        return self._layers[module]

    def layers(self) -> list[LayerCache]:
        return list(self._layers.values())

    def tensors(self) -> list[torch.Tensor]:
        """k and v of every layer."""
        return [part for layer in self._layers.values() for part in (layer.k, layer.v)]

    def touch(self, seconds: float) -> None:
        """Write to the pages of host memory, first blocks first, before anything is in them.

        The first write to a page takes milliseconds where a machine gets its memory lazily, which
        no step should wait for. Ends early when it has taken so many `seconds`.
        """
        parts = self.tensors()
        if not parts:
            return
        step = max(1, _TOUCHED * self.blocks * len(parts) // self.nbytes)
        end = time.monotonic() + seconds
        with ThreadPoolExecutor() as threads:
            for start in range(0, self.blocks, step):
                for _ in threads.map(_touch, [part[start : start + step] for part in parts]):
                    pass
                if time.monotonic() > end:
                    break

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.tensors())


def _touch(tensor: torch.Tensor) -> None:
    tensor.view(-1).view(torch.uint8)[::_PAGE] = 0


def bytes_per_block(
    shapes: Mapping[nn.Module, LayerShape], *, block_size: int, dtype: torch.dtype
) -> int:
    """Bytes one block takes over all layers."""
    values = sum(s.kv_heads * (s.head_dim + s.value_dim) for s in shapes.values())
    return values * block_size * dtype.itemsize
