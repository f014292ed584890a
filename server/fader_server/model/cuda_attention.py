"""Paged attention by the Triton kernels: no gathers, nothing on the host between the layers."""

from collections.abc import Iterable

import torch
from triton import knobs

from fader_adapters.kernels.cuda.attention import PagedAttention as Kernel
from fader_adapters.kernels.cuda.attention import Scratch, write_cache
from fader_adapters.kernels.cuda.attention_configs import MAX_DIM
from fader_adapters.kernels.cuda.attention_step import AttentionStep
from fader_server.model.attention import AttentionParams
from fader_server.model.batch import Batch
from fader_server.model.kv_cache import LayerCache, LayerShape


def obstacle(shapes: Iterable[LayerShape], dtype: torch.dtype) -> str:
    """Why the kernels do not take a base's layers; empty where they do."""
    if dtype == torch.float32 and not knobs.runtime.interpret:  # its tiles fit no shared memory
        return "its kernels are for bfloat16 and float16"
    if all(s.head_dim == s.value_dim <= MAX_DIM and s.head_dim % 16 == 0 for s in shapes):
        return ""
    return f"a head size is no multiple of 16 up to {MAX_DIM}, or another for values than for keys"


class CudaAttention:
    """PagedAttention over caches in device memory.

    max_rows, max_context, max_tokens: what a step may hold; partial sums for so many rows of so
    many keys are reserved when a layer first attends, so nothing moves once every layer has.
    """

    def __init__(
        self, *, max_rows: int, max_context: int, device: torch.device, max_tokens: int = 512
    ) -> None:
        self.max_rows = max_rows
        self.max_context = max_context
        self.max_tokens = max_tokens
        self._scratch = Scratch(device)
        self._layers: dict[int, tuple[AttentionParams, int, Kernel]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of scratch reserved so far."""
        return self._scratch.nbytes

    def prepare(self, batch: Batch) -> AttentionStep:
        """Sends nothing to the device. Grids follow from what `batch.rows` says a row may have."""
        single = [row.context for row in batch.rows if row.count == 1]
        return AttentionStep(
            cu_tokens=batch.cu_tokens,
            contexts=batch.contexts,
            block_tables=batch.block_tables,
            tokens=batch.tokens,
            context=max(single, default=0),
            decodes=bool(single),
            prefills=len(single) < len(batch.rows),
        )

    def write(
        self, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor
    ) -> None:
        """Slots below 0 (padding) store nothing."""
        write_cache(k, v, cache.k, cache.v, slots)

    def attend(
        self, q: torch.Tensor, cache: LayerCache, params: AttentionParams, step: object
    ) -> torch.Tensor:
        assert isinstance(step, AttentionStep)
        # tokens of padding belong to no row, and no kernel answers them
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device) if step.prefills else None
        return self._kernel(cache, params, q.shape[1])(q, step, out=out)

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
                scratch=self._scratch,
            )
            # one row more: StepBuffers keep one for tokens that are padding
            kernel.reserve(rows=self.max_rows + 1, context=self.max_context)
            found = self._layers[cache.k.data_ptr()] = (params, heads, kernel)
        return found[2]
