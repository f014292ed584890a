"""Paged attention by the native CPU kernel: no gathers, every row on its own."""

import torch

from fader_adapters.kernels.native import PagedAttention as Kernel
from fader_adapters.kernels.native import Tape, Workspace, attention_fits
from fader_server.model.attention import AttentionParams
from fader_server.model.batch import Batch
from fader_server.model.kv_cache import LayerCache, LayerShape


def fits(shape: LayerShape) -> bool:
    """Whether the kernel takes the layer's heads."""
    return attention_fits(shape.head_dim) and attention_fits(shape.value_dim)


class NativeAttention:
    """PagedAttention over fp32 or bf16 caches in host memory."""

    def __init__(self, tape: Tape | None = None) -> None:
        self._tape = tape
        self._scratch = Workspace()
        self._layers: dict[int, tuple[AttentionParams, int, Kernel]] = {}

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def write(
        self, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor
    ) -> None:
        kernel = self._layers.get(cache.k.data_ptr())
        if kernel is None:
            cache.k.flatten(0, 1).index_copy_(0, slots, k)
            cache.v.flatten(0, 1).index_copy_(0, slots, v)
        else:
            kernel[2].write(_heads_adjacent(k), _heads_adjacent(v), slots)

    def attend(
        self, q: torch.Tensor, cache: LayerCache, params: AttentionParams, step: object
    ) -> torch.Tensor:
        assert isinstance(step, Batch)
        kernel = self._kernel(cache, params, q.shape[1])
        return kernel(
            q.contiguous(),
            q_start=step.cu_tokens,
            context=step.contexts,
            block_tables=step.block_tables,
        )

    def _kernel(self, cache: LayerCache, params: AttentionParams, heads: int) -> Kernel:
        """Bound to the layer's cache at its first call; a layer attends in one way only."""
        found = self._layers.get(cache.k.data_ptr())
        if found is None or found[:2] != (params, heads):
            kernel = Kernel(
                cache.k,
                cache.v,
                heads=heads,
                scale=params.scale,
                window=params.window or 0,
                softcap=params.softcap or 0.0,
                sinks=params.sinks,
                workspace=self._scratch,
                tape=self._tape,
            )
            found = self._layers[cache.k.data_ptr()] = (params, heads, kernel)
        return found[2]


def _heads_adjacent(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == x.shape[2] else x.contiguous()
