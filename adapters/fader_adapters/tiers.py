"""Where adapters rest in host memory: inside the CPU arena, or in buffers under a byte budget."""

from collections.abc import Sequence
from typing import Protocol

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
    """CPU: the host tier is the device arena itself; an adapter is stored once, never copied."""

    def __init__(self, arena: torch.Tensor) -> None:
        """`arena`: 1-D; every element of it is this tier's from now on."""
        self._arena = arena
        self._extents = ExtentAllocator(arena.numel())

    @property
    def used_bytes(self) -> int:
        return self._extents.used * self._arena.itemsize

    @property
    def total_bytes(self) -> int:
        return self._extents.capacity * self._arena.itemsize

    def allocate(self, numel: int) -> torch.Tensor | None:
        if not self._extents.fits_empty(numel):
            raise _too_large(numel * self._arena.itemsize, self.total_bytes)
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


class BufferTier:
    """Beside a GPU: one buffer an adapter under a byte budget, pinned for fast transfers."""

    def __init__(
        self, total_bytes: int, dtype: torch.dtype, *, pinned: bool, largest: int | None = None
    ) -> None:
        """`largest`: bytes that one adapter may have, for the device must hold it; None: all."""
        self._total = total_bytes
        self._largest = total_bytes if largest is None else min(largest, total_bytes)
        self._used = 0
        self._dtype = dtype
        self._pinned = pinned

    @property
    def used_bytes(self) -> int:
        return self._used

    @property
    def total_bytes(self) -> int:
        return self._total

    def allocate(self, numel: int) -> torch.Tensor | None:
        size = numel * self._dtype.itemsize
        if size > self._largest:
            raise _too_large(size, self._largest)
        if self._used + size > self._total:
            return None
        flat = torch.empty(numel, dtype=self._dtype, pin_memory=self._pinned)
        self._used += size
        return flat

    def free(self, flat: torch.Tensor) -> None:
        self._used -= flat.nbytes

    def clearing(self, nbytes: int, held: Sequence[tuple[torch.Tensor, int]]) -> list[int] | None:
        room, found = self._total - self._used, []
        for index in sorted(range(len(held)), key=lambda index: held[index][1]):
            if room >= nbytes:
                break
            room += held[index][0].nbytes
            found.append(index)
        return found if room >= nbytes else None


def _too_large(size: int, total: int) -> AdapterTooLarge:
    return AdapterTooLarge(
        f"the adapter needs {size} bytes, the arena for adapters has {total} in all; "
        "start with a larger one or use a lower rank"
    )
