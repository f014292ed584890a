"""Where adapters rest in host memory: in an arena, the CPU's own or a page-locked one beside a
GPU."""

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from fader_adapters.errors import AdapterTooLarge
from fader_adapters.extents import ExtentAllocator


class HostTier(Protocol):
    """Host memory for adapter weights. Owned by the store's thread; fails only by its answers."""

    @property
    def used_bytes(self) -> int: ...

    @property
    def total_bytes(self) -> int: ...

    def allocate(self, numel: int) -> torch.Tensor | None:
        """A 1-D tensor of `numel` elements, contents undefined; None: not now.

        Raises AdapterTooLarge when it could not fit even alone.
        """
        ...

    def free(self, flat: torch.Tensor) -> None:
        """Take back what `allocate` gave; nobody may read it any more."""
        ...

    def clearing(self, nbytes: int, held: Sequence[tuple[torch.Tensor, int]]) -> list[int] | None:
        """Which of `held`, buffers and what it costs to free each, to free so that `nbytes` fit.

        Indices, at about the least cost. None: not even without all of them. Changes nothing.
        """
        ...


class ArenaTier:
    """One tensor in which adapters lie side by side; takes no memory of its own.

    On a CPU it is the device arena itself: an adapter is stored once, never copied.
    """

    def __init__(self, arena: torch.Tensor, *, largest: int | None = None) -> None:
        """`arena`: 1-D; every element of it is this tier's from now on. `largest`: bytes that one
        adapter may have, for the device must hold it; None: as many as there are."""
        self._arena = arena
        self._extents = ExtentAllocator(arena.numel())
        self._largest = self.total_bytes if largest is None else min(largest, self.total_bytes)

    @property
    def used_bytes(self) -> int:
        return self._extents.used * self._arena.itemsize

    @property
    def total_bytes(self) -> int:
        return self._extents.capacity * self._arena.itemsize

    def allocate(self, numel: int) -> torch.Tensor | None:
        size = numel * self._arena.itemsize
        if size > self._largest or not self._extents.fits_empty(numel):
            raise AdapterTooLarge(
                f"the adapter needs {size} bytes, the arena for adapters has {self._largest} in "
                "all; start with a larger one or use a lower rank"
            )
        offset = self._extents.allocate(numel)
        return None if offset is None else self._arena[offset : offset + numel]

    def free(self, flat: torch.Tensor) -> None:
        self._extents.release(self._offset(flat))

    def clearing(self, nbytes: int, held: Sequence[tuple[torch.Tensor, int]]) -> list[int] | None:
        at = {self._offset(flat): index for index, (flat, _) in enumerate(held)}
        costs = {offset: held[index][1] for offset, index in at.items()}
        found = self._extents.clearing(-(-nbytes // self._arena.itemsize), costs)
        return None if found is None else [at[offset] for offset in found]

    def _offset(self, flat: torch.Tensor) -> int:
        return int(flat.storage_offset()) - int(self._arena.storage_offset())


def locked_tier(total_bytes: int, dtype: torch.dtype, *, largest: int) -> ArenaTier:
    """Beside a GPU: an arena of exactly `total_bytes`, page-locked, for copies beside all work.

    All of it is taken now, about 0.3 s a GiB, and given back with the tier: later a load neither
    waits for the driver nor fails for want of memory. Not by torch's pinned allocator, which rounds
    a size up to a power of two and keeps what was freed. Raises RuntimeError where the host does
    not give so much.
    """
    arena = torch.empty(total_bytes // dtype.itemsize, dtype=dtype)
    tier = ArenaTier(arena, largest=largest)
    if not arena.nbytes:
        return tier
    cudart: Any = torch.cuda.cudart()
    code = int(cudart.cudaHostRegister(arena.data_ptr(), arena.nbytes, 0))
    if code:
        raise RuntimeError(f"cudaHostRegister of {arena.nbytes} bytes failed with code {code}")
    # with the arena, for it must be there still: what lies at its address next is another's
    weakref.finalize(tier, _unlock, cudart, arena).atexit = False
    return tier


def _unlock(cudart: Any, arena: torch.Tensor) -> None:  # noqa: ANN401 - torch's module of functions
    cudart.cudaHostUnregister(arena.data_ptr())
