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
    max_model_len: int
    """Tokens of the longest sequence."""

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
    max_model_len: int | None,
    max_positions: int,
    arena: int | None,
    kv_cache: int | None,
) -> MemoryPlan:
    """Divide `available` bytes (free once the base is loaded). None means: choose.

    By default the KV cache holds `max_rows` sequences of full length, or what fits, and a sequence
    has the base's `max_positions`, or what the cache holds. Raises ConfigInvalid when what was
    asked for does not fit, or no single sequence of the length that was asked for would.
    """
    length = max_positions if max_model_len is None else max_model_len
    budget = int(available * (HOST_SHARE if on_host else DEVICE_SHARE))
    arena = min(DEFAULT_ARENA, budget // 4) if arena is None else arena
    per_sequence = -(-length // block_size)
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
    if blocks < per_sequence + 1 and (max_model_len is not None or blocks < 2):
        raise ConfigInvalid(
            f"the KV cache holds {max(0, blocks - 1) * block_size} tokens, less than one "
            f"sequence of {length}; raise --kv-cache to {(per_sequence + 1) * block_bytes} bytes "
            "or lower --max-model-len"
        )
    length = min(length, (blocks - 1) * block_size)
    return MemoryPlan(base, arena, blocks * block_bytes, blocks, length)
