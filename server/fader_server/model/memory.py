"""One memory plan in bytes: base, arena, KV cache. Integers only."""

from dataclasses import dataclass

from fader_server.errors import ConfigInvalid

GIB = 1 << 30
HOST_SHARE = 0.5
"""Of the host memory that is free after the base, at most this much is reserved by default."""
DEVICE_SHARE = 0.9
DEFAULT_ARENA = GIB // 2
FIXED_WORKSPACE = GIB // 2
LIVE_ACTIVATIONS = 8
"""Tensors as wide as the widest linear that are alive at one time, at most."""
SAMPLING_BYTES = 64
"""For each logit: fp32 copies, int64 masses, their sums and order."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What is reserved at start; nothing grows afterwards."""

    base: int
    arena: int
    kv_cache: int
    blocks: int
    """KV blocks, the null block included."""
    max_model_len: int
    """Tokens of the longest sequence."""
    workspace: int = 0
    """Left free for what steps allocate on a GPU."""

    @property
    def total(self) -> int:
        return self.base + self.arena + self.kv_cache + self.workspace


def workspace_bytes(
    *, max_rows: int, step_tokens: int, chunk: int, widest: int, vocab: int, itemsize: int
) -> int:
    """What a GPU needs beside weights, arena and cache: an estimate from above.

    Activations of a step, logits of its rows through the sampler's sums in int64, those of a chunk
    with prompt logprobs; libraries, graphs and the deltas' buffers in a fixed sum: their scratch is
    bounded whatever a step holds, see `fader_adapters.kernels.cuda.lora_tables`.
    """
    activations = step_tokens * widest * itemsize * LIVE_ACTIVATIONS
    logits = max_rows * vocab * SAMPLING_BYTES + chunk * vocab * itemsize
    return FIXED_WORKSPACE + activations + logits


def plan_memory(
    *,
    available: int,
    on_host: bool,
    base: int,
    block_bytes: int,
    block_size: int,
    max_rows: int,
    max_model_len: int | None,
    max_positions: int,
    arena: int | None,
    kv_cache: int | None,
    workspace: int = 0,
) -> MemoryPlan:
    """Divide `available` bytes (free once the base is loaded). None means: choose.

    By default the KV cache holds `max_rows` sequences of full length, or what fits, and a sequence
    has the base's `max_positions`, or what the cache holds. Raises ConfigInvalid when what was
    asked for does not fit, or no single sequence of the length that was asked for would.
    """
    length = max_positions if max_model_len is None else max_model_len
    share = HOST_SHARE if on_host else DEVICE_SHARE
    budget = int(max(0, available - workspace) * share)
    arena = min(DEFAULT_ARENA, budget // 4) if arena is None else arena
    per_sequence = -(-length // block_size)
    if kv_cache is None:
        blocks = min(max_rows * per_sequence + 1, max(0, budget - arena) // block_bytes)
    else:
        blocks = kv_cache // block_bytes
    needed = arena + blocks * block_bytes + workspace
    if needed > available:
        working = f" with {workspace} bytes for the work of a step" if workspace else ""
        raise ConfigInvalid(
            f"--arena {arena} and --kv-cache {blocks * block_bytes} bytes{working} need {needed}, "
            f"but {available} are free beside the base; ask for less"
        )
    if blocks < per_sequence + 1 and (max_model_len is not None or blocks < 2):
        raise ConfigInvalid(
            f"the KV cache holds {max(0, blocks - 1) * block_size} tokens, less than one "
            f"sequence of {length}; raise --kv-cache to {(per_sequence + 1) * block_bytes} bytes "
            "or lower --max-model-len"
        )
    length = min(length, (blocks - 1) * block_size)
    return MemoryPlan(base, arena, blocks * block_bytes, blocks, length, workspace)
