"""Pinned host memory and the copies from and to it that the host does not wait for.

What comes to the host is seen there when the host has waited for it, and rubbish before; what goes
out must not have changed by then. Memory that nobody holds any more belongs to torch's caching
allocator, which keeps it until its copies have ended.
"""

import ctypes
from dataclasses import dataclass
from types import SimpleNamespace
from weakref import ref

import numpy as np
import torch

from tests.support.pretend_cuda.clocks import Clocks
from tests.support.pretend_cuda.faults import Notices

RUBBISH = 0x5A


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy that may still be under way."""

    block: "ref[np.ndarray]"
    start: int
    """Its first byte in the block."""
    bytes: np.ndarray
    incoming: bool
    """To the host; else from it."""
    work: tuple[int, int]

    @property
    def there(self) -> np.ndarray | None:
        """The bytes of the block as they are now; None: it was given back."""
        block = self.block()
        return None if block is None else block[self.start : self.start + self.bytes.size]


class Host:
    """All pinned memory of a process."""

    def __init__(self, clocks: Clocks, notices: Notices) -> None:
        self._clocks, self._notices = clocks, notices
        self._blocks: dict[int, ref[np.ndarray]] = {}
        self._copies: list[Copy] = []
        self._registered: dict[int, np.ndarray] = {}
        self.room = 1 << 40
        """Bytes that one call registers at most."""
        self.pinned = 0
        """Blocks handed out so far."""

    def allocate(self, like: torch.Tensor, *, filled: bool) -> torch.Tensor:
        """A pinned tensor of that shape and type, with the same values or rubbish."""
        size = like.numel() * like.element_size()
        block = np.full(max(size, 1), RUBBISH, np.uint8)
        self._blocks = {at: kept for at, kept in self._blocks.items() if kept() is not None}
        self._blocks[block.ctypes.data] = ref(block)
        self.pinned += 1
        made = torch.from_numpy(block)[:size].view(like.dtype).view(like.shape)
        if filled:
            made.copy_(like)
        return made

    def register(self, address: int, size: int, flags: int) -> int:
        """cudaHostRegister: memory that was there before is pinned until `unregister`."""
        if address in self._registered or size > self.room:
            return 712 if address in self._registered else 2
        block = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        self._registered[address] = block
        self._blocks[address] = ref(block)
        return 0

    def unregister(self, address: int) -> int:
        """cudaHostUnregister."""
        del self._registered[address]
        return 0

    def cudart(self) -> SimpleNamespace:
        """The functions of CUDA's runtime that are called as such."""
        return SimpleNamespace(cudaHostRegister=self.register, cudaHostUnregister=self.unregister)

    @property
    def registered(self) -> int:
        """Bytes that are pinned in place."""
        return sum(block.size for block in self._registered.values())

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in pinned memory."""
        return self._block(tensor) is not None

    def copy_out(self, source: torch.Tensor, work: tuple[int, int]) -> None:
        """A device begins to read a pinned tensor. Raises PretendFault."""
        self.check()
        self._add(source, _bytes(source), work, incoming=False)

    def copy_in(self, target: torch.Tensor, values: torch.Tensor, work: tuple[int, int]) -> None:
        """A device begins to write a pinned tensor."""
        self._add(target, _bytes(values.to(target.dtype)), work, incoming=True)
        target.view(-1).view(torch.uint8).fill_(RUBBISH)

    def settle(self) -> None:
        """The host waited for something: what has ended is there. Raises PretendFault."""
        self.check()
        kept = []
        for copy in self._copies:
            if not self._clocks.done(*copy.work):
                kept.append(copy)
            elif copy.incoming and (there := copy.there) is not None:
                there[:] = copy.bytes
        self._copies = kept

    def check(self) -> None:
        """Raise PretendFault where what is on its way to the device has changed."""
        self._copies = [copy for copy in self._copies if copy.block() is not None]
        for copy in self._copies:
            there = copy.there
            if not copy.incoming and there is not None and not np.array_equal(there, copy.bytes):
                self._copies.remove(copy)
                raise self._notices.fault(
                    f"{copy.bytes.size} bytes of pinned memory were written before the copy of "
                    f"them to the device (stream {copy.work[0]}) had ended"
                )

    def reads(self, tensor: torch.Tensor, what: str) -> None:
        """The host reads a tensor. Raises PretendFault where a copy to it is under way."""
        if not self._copies:
            return
        block = self._block(tensor)
        if block is None:
            return
        start = tensor.data_ptr() - block.ctypes.data
        stop = start + tensor.numel() * tensor.element_size()
        for copy in self._copies:
            overlaps = copy.start < stop and start < copy.start + copy.bytes.size
            if copy.incoming and copy.block() is block and overlaps:
                raise self._notices.fault(
                    f"{what} reads pinned memory before the copy from the device (stream "
                    f"{copy.work[0]}) has ended"
                )

    def _block(self, tensor: torch.Tensor) -> np.ndarray | None:
        found = self._blocks.get(tensor.untyped_storage().data_ptr())
        return None if found is None else found()

    def _add(
        self, tensor: torch.Tensor, values: np.ndarray, work: tuple[int, int], *, incoming: bool
    ) -> None:
        block = self._block(tensor)
        assert block is not None
        assert tensor.is_contiguous(), "copies of strided pinned memory are not modelled"
        start = tensor.data_ptr() - block.ctypes.data
        self._copies.append(Copy(ref(block), start, values, incoming, work))


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().copy()
