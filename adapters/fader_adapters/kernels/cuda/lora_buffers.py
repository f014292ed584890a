"""Device memory of the delta kernels: the tables' copy and one step's tiles. Launches nothing."""

from collections.abc import Sequence

import torch

from fader_adapters.kernels.cuda.step_layout import Capacity, PhaseAt, StepLayout
from fader_adapters.kernels.cuda.tiles import CHUNK, StepTiles
from fader_adapters.kernels.tables import Tables


class DeviceTables:
    """The GPU's copy of kernels.tables.Tables; no captured graph reads it, so it may move.

    a_offset … bias_offset  [slots, linears] int64;  rank int32;  scale float32
    chunks              16-rank chunks of each slot's largest rank, on the host
    vectors             whether a slot has a gain or a bias anywhere, on the host
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._source: Tables | None = None
        self.generation = -1
        self.chunks: Sequence[int] = ()
        self.vectors: Sequence[bool] = ()
        self.a_offset = self.b_offset = torch.empty(0, 0, dtype=torch.int64, device=device)
        self.gain_offset = self.bias_offset = self.a_offset
        self.rank = torch.empty(0, 0, dtype=torch.int32, device=device)
        self.scale = torch.empty(0, 0, dtype=torch.float32, device=device)

    def refresh(self, tables: Tables) -> bool:
        """Copy the tables if they changed, in order on the current stream; whether they did."""
        if tables is self._source and tables.generation == self.generation:
            return False
        vectors = (tables.gain_offset, tables.bias_offset)
        parts = (tables.a_offset, tables.b_offset, *vectors, tables.rank, tables.scale)
        sizes = [part.nbytes for part in parts]
        staged = host_block(sum(sizes), torch.uint8, self._device)
        for part, room in zip(parts, staged.split(sizes), strict=True):
            room.copy_(part.contiguous().view(-1).view(torch.uint8))
        copy = staged.to(self._device, non_blocking=True)
        moved = [
            room.view(part.dtype).view(part.shape)
            for part, room in zip(parts, copy.split(sizes), strict=True)
        ]
        self.a_offset, self.b_offset, self.gain_offset, self.bias_offset = moved[:4]
        self.rank, self.scale = moved[4:]
        largest = tables.rank.amax(dim=1) if tables.slots else tables.rank.new_zeros(0)
        self.chunks = (-(-largest // CHUNK)).tolist()
        self.vectors = (torch.maximum(*vectors) >= 0).any(dim=1).tolist()
        self._source, self.generation = tables, tables.generation
        return True


class PhaseBuffers:
    """The arrays of one piece of a phase of a step, at fixed addresses; see tiles.Phase."""

    def __init__(
        self, block: torch.Tensor, at: PhaseAt, tiles: int, *, rows: int, cells: int, tokens: int
    ) -> None:
        self.header = block[at.header :]
        self.tokens = block[at.tokens : at.tokens + tiles * rows]
        self.first = block[at.first : at.first + tiles]
        self.last = block[at.last : at.last + tiles]
        self.cell = block[at.cell : at.cell + tiles]
        self.place = block[at.place : at.place + tokens]
        self.cells = cells
        """Capacity in cells."""


class StepBuffers:
    """Room for one step up to `capacity`; every tensor keeps its address for life.

    block   int32 words: tiles and entries as StepLayout places them, one copy a step
    a_at, b_at, gain_at, bias_at  [linears, entries] int64, left, rank_at int32, scale_at float32:
            entries resolved per linear
    z       float32 scratch of the widest site, for one piece at a time
    """

    def __init__(
        self,
        layout: StepLayout,
        decode_rows: int,
        linears: int,
        z: int,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.turn = 0
        """How often they were filled or emptied: a step before the last is no longer here."""
        capacity = self.capacity
        self.block = torch.zeros(layout.words, dtype=torch.int32, device=device)
        shape = (linears, capacity.entries)
        self.a_at = torch.zeros(shape, dtype=torch.int64, device=device)
        self.b_at = torch.zeros(shape, dtype=torch.int64, device=device)
        self.gain_at = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.bias_at = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.left = torch.zeros(shape, dtype=torch.int32, device=device)
        self.rank_at = torch.zeros(shape, dtype=torch.int32, device=device)
        self.scale_at = torch.zeros(shape, dtype=torch.float32, device=device)
        self.z = torch.empty(z, dtype=torch.float32, device=device)
        self.decode = self._phase(
            layout.decode, capacity.decode_tiles, rows=decode_rows, cells=capacity.decode_cells
        )
        self.prefill = self._phase(
            layout.prefill,
            capacity.prefill_tiles,
            rows=layout.prefill_rows,
            cells=capacity.prefill_cells,
        )
        self.slot = self.block[layout.slot : layout.slot + capacity.entries]
        self.chunk = self.block[layout.chunk : layout.chunk + capacity.entries]
        self.gamma = self.block[layout.gamma :].view(torch.float32)

    def _phase(
        self, places: tuple[PhaseAt, ...], tiles: int, *, rows: int, cells: int
    ) -> tuple[PhaseBuffers, ...]:
        tokens = self.capacity.tokens
        return tuple(
            PhaseBuffers(self.block, at, tiles, rows=rows, cells=cells, tokens=tokens)
            for at in places
        )

    @property
    def capacity(self) -> Capacity:
        return self.layout.capacity

    @property
    def nbytes(self) -> int:
        offsets = (self.a_at, self.b_at, self.gain_at, self.bias_at)
        tensors = (self.block, *offsets, self.left, self.rank_at, self.scale_at, self.z)
        return sum(tensor.nbytes for tensor in tensors)

    def fill(self, step: StepTiles) -> None:
        """One pinned copy, in order on the current stream; waits for nothing."""
        self.turn += 1
        staged = host_block(self.layout.words, torch.int32, self.block.device)
        words = self.layout.pack(step, staged.numpy())
        self.block[:words].copy_(staged[:words], non_blocking=True)

    def clear(self) -> None:
        """Hold a step without any tile."""
        self.turn += 1
        self.block.zero_()


def host_block(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host memory for one copy to `device`. Pinned memory comes from torch's caching allocator,
    which hands a block out again only when the copies from it are done.
    """
    return torch.empty(size, dtype=dtype, pin_memory=device.type == "cuda")
