"""Paged attention by the native CPU kernel: no gathers, every row on its own."""

import torch

from fader_adapters.kernels.native import PagedAttention as Kernel
from fader_adapters.kernels.native import Workspace
from fader_server.model.attention import AttentionParams
from fader_server.model.batch import Batch
from fader_server.model.kv_cache import LayerCache, LayerShape


def fits(shape: LayerShape) -> bool:
    """The kernel takes head sizes that are multiples of 16 up to 256, equal for keys and values."""
    return shape.head_dim == shape.value_dim <= 256 and shape.head_dim % 16 == 0


class NativeAttention:
    """PagedAttention over fp32 or bf16 caches in host memory."""

    def __init__(self) -> None:
        self._scratch = Workspace()
        self._layers: dict[tuple[int, int, AttentionParams], Kernel] = {}

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def attend(
        self, q: torch.Tensor, cache: LayerCache, params: AttentionParams, step: object
    ) -> torch.Tensor:
        assert isinstance(step, Batch)
        key = (cache.k.data_ptr(), q.shape[1], params)
        kernel = self._layers.get(key)
        if kernel is None:
            kernel = self._layers[key] = Kernel(
                cache.k,
                cache.v,
                heads=q.shape[1],
                scale=params.scale,
                window=params.window or 0,
                softcap=params.softcap or 0.0,
                workspace=self._scratch,
            )
        return kernel(
            q.contiguous(),
            q_start=step.cu_tokens,
            context=step.contexts,
            block_tables=step.block_tables,
        )
