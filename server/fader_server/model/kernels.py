"""Chooses the attention for a base and how its decode steps run, in one place."""

from fader_adapters.kernels.cpu import NativeBackend
from fader_server.model import cpu_attention
from fader_server.model.attention import PagedAttention
from fader_server.model.decode import DecodeInputs, DecodeReplays
from fader_server.model.kv_cache import KVCache
from fader_server.model.loader import LoadedBase
from fader_server.model.torch_attention import TorchAttention

REPLAYED_ROWS = 64
"""Rows from which on a step is all kernels, and a recording of every number of rows costs more."""


def choose_attention(base: LoadedBase, *, block_size: int) -> PagedAttention:
    """The native kernel where its linears run and every head fits, else plain torch."""
    backend = base.backend
    fits = all(cpu_attention.fits(shape) for shape in base.layers.values())
    if isinstance(backend, NativeBackend) and fits:
        return cpu_attention.NativeAttention(backend.tape)
    return TorchAttention(block_size)


def choose_replays(
    base: LoadedBase, *, cache: KVCache, attention: PagedAttention
) -> DecodeReplays | None:
    """Recorded decode steps where linears and attention are both native."""
    if not isinstance(base.backend, NativeBackend):
        return None
    if not isinstance(attention, cpu_attention.NativeAttention):
        return None
    inputs = DecodeInputs(
        rows=REPLAYED_ROWS, blocks_per_row=cache.blocks, block_size=cache.block_size
    )
    return DecodeReplays(base.backend.tape, inputs, rows=REPLAYED_ROWS)
