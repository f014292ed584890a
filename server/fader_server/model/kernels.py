"""Chooses the attention for a base, in one place."""

from fader_adapters.kernels.cpu import NativeBackend
from fader_server.model import cpu_attention
from fader_server.model.attention import PagedAttention
from fader_server.model.loader import LoadedBase
from fader_server.model.torch_attention import TorchAttention


def choose_attention(base: LoadedBase, *, block_size: int) -> PagedAttention:
    """The native kernel where its linears run and every head fits, else plain torch."""
    native = isinstance(base.backend, NativeBackend)
    if native and all(cpu_attention.fits(shape) for shape in base.layers.values()):
        return cpu_attention.NativeAttention()
    return TorchAttention(block_size)
