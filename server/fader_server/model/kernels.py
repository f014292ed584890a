"""Chooses the attention for a base, what its logits are read by and how its steps are run again, in
one place."""

import logging
from collections.abc import Callable

import torch

from fader_adapters.kernels.backend import Step
from fader_adapters.kernels.cpu import NativeBackend
from fader_adapters.kernels.native import Tape, Workspace, logits
from fader_adapters.kernels.tables import Tables
from fader_server.model import cpu_attention
from fader_server.model.attention import PagedAttention
from fader_server.model.batch import Batch
from fader_server.model.decode import DecodeInputs, DecodeReplays, Replays
from fader_server.model.distribution import (
    Distributions,
    NativeDistributions,
    TorchDistributions,
)
from fader_server.model.kv_cache import KVCache
from fader_server.model.loaded import LoadedBase
from fader_server.model.prefill import NativeReplays, PrefillInputs, PrefillReplays
from fader_server.model.replay import Arena
from fader_server.model.torch_attention import TorchAttention

log = logging.getLogger(__name__)

REPLAYED_ROWS = 64
"""Rows from which on a step is all kernels, and a recording of every number of rows costs more."""


def choose_attention(
    base: LoadedBase,
    *,
    block_size: int,
    max_rows: int = 64,
    max_context: int | None = None,
    max_tokens: int = 512,
) -> PagedAttention:
    """The kernels of the base's backend where every head fits them, else plain torch.

    max_rows, max_context, max_tokens: what a step may hold; None: the base's own positions.
    """
    if base.backend.name == "cuda":
        from fader_server.model import cuda_attention  # imports triton

        obstacle = cuda_attention.obstacle(base.layers.values(), base.dtype)
        if not obstacle:
            return cuda_attention.CudaAttention(
                max_rows=max_rows,
                max_context=max_context or base.max_positions,
                max_tokens=max_tokens,
                device=base.device,
            )
        log.warning("attention runs in plain torch, without CUDA graphs: %s", obstacle)
    tape = base.backend.tape if isinstance(base.backend, NativeBackend) else None
    return attention_alone(base, block_size=block_size, tape=tape)


def attention_alone(
    base: LoadedBase, *, block_size: int, tape: Tape | None = None
) -> PagedAttention:
    """The CPU's kernels where every head fits them, else plain torch. Without the engine's tape it
    is for forwards of another thread."""
    native = isinstance(base.backend, NativeBackend)
    if native and all(map(cpu_attention.fits, base.layers.values())):
        return cpu_attention.NativeAttention(tape)
    return TorchAttention(block_size)


def choose_distributions(base: LoadedBase) -> Distributions:
    """The kernels of the base's backend, native ones where they take its vocabulary."""
    if base.backend.name == "cuda":
        from fader_server.model.cuda_distribution import CudaDistributions  # imports triton

        return CudaDistributions(base.vocab_size, base.device)
    native = isinstance(base.backend, NativeBackend) and base.vocab_size <= logits.MOST
    return NativeDistributions() if native else TorchDistributions()


def choose_replays(
    base: LoadedBase,
    *,
    cache: KVCache,
    attention: PagedAttention,
    tables: Tables,
    forward: Callable[[Batch, Step | None], torch.Tensor],
) -> Replays | None:
    """Recorded steps, or CUDA graphs, where linears and attention are both kernels."""
    if base.solo is not None:
        return None
    if base.device.type == "cuda" and base.backend.name == "cuda":
        from fader_server.model import graphs  # imports triton

        return graphs.capture(base, cache=cache, attention=attention, tables=tables, run=forward)
    if not isinstance(base.backend, NativeBackend):
        return None
    if not isinstance(attention, cpu_attention.NativeAttention):
        return None
    size, tape = cache.block_size, base.backend.tape
    arena, scratch = Arena(), Workspace()
    decode = DecodeReplays(
        tape,
        DecodeInputs(
            rows=REPLAYED_ROWS,
            blocks_per_row=cache.blocks,
            block_size=size,
            states=base.packed_states,
        ),
        rows=REPLAYED_ROWS,
        arena=arena,
        scratch=scratch,
    )
    states = base.packed_states

    def left(batch: Batch) -> list[torch.Tensor]:
        paged = [part.flatten(0, 1)[batch.slots] for part in cache.tensors()]
        return (
            paged if batch.states is None or states is None else paged + states.left(batch.states)
        )

    inputs = PrefillInputs(block_size=size, states=base.packed_states)
    return NativeReplays(
        decode,
        PrefillReplays(tape, inputs, forward=forward, left=left, arena=arena, scratch=scratch),
    )
