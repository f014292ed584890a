"""One memory plan in bytes: base, arena, KV cache. Integers only."""

from dataclasses import dataclass

from fader_server.errors import ConfigInvalid

GIB = 1 << 30
HOST_SHARE = 0.5
"""Of the host memory that is free after the base, at most this much is reserved by default."""
DEVICE_SHARE = 0.9
DEFAULT_ARENA = GIB // 2


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What is reserved at start; nothing grows afterwards."""

    base: int
    arena: int
    kv_cache: int
    blocks: int
    """KV blocks, the null block included."""

    @property
    def total(self) -> int:
        return self.base + self.arena + self.kv_cache


def plan_memory(
    *,
    available: int,
    on_host: bool,
    base: int,
    block_bytes: int,
    block_size: int,
    max_rows: int,
    max_model_len: int,
    arena: int | None,
    kv_cache: int | None,
) -> MemoryPlan:
    """Divide `available` bytes (free once the base is loaded). None means: choose.

    By default the KV cache holds `max_rows` sequences of full length, or what fits. Raises
    ConfigInvalid when what was asked for does not fit, or no single sequence would.
    """
    budget = int(available * (HOST_SHARE if on_host else DEVICE_SHARE))
    arena = min(DEFAULT_ARENA, budget // 4) if arena is None else arena
    per_sequence = -(-max_model_len // block_size)
    if kv_cache is None:
        blocks = min(max_rows * per_sequence + 1, max(0, budget - arena) // block_bytes)
    else:
        blocks = kv_cache // block_bytes
    needed = arena + blocks * block_bytes
    if needed > available:
        raise ConfigInvalid(
            f"--arena {arena} and --kv-cache {blocks * block_bytes} bytes need {needed}, but "
            f"{available} are free beside the base; ask for less"
        )
    if blocks < per_sequence + 1:
        raise ConfigInvalid(
            f"the KV cache holds {max(0, blocks - 1) * block_size} tokens, less than one "
            f"sequence of {max_model_len}; raise --kv-cache to "
            f"{(per_sequence + 1) * block_bytes} bytes or lower --max-model-len"
        )
    return MemoryPlan(base, arena, blocks * block_bytes, blocks)
