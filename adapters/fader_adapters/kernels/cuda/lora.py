"""The batched delta on a GPU: which buffers a step lives in. Knows tables and rows, not models."""

from dataclasses import dataclass

import torch

from fader_adapters.errors import BaseUnsupported, KernelUnavailable
from fader_adapters.kernels.cuda.lora_buffers import DeviceTables, StepBuffers
from fader_adapters.kernels.cuda.lora_calls import resolve
from fader_adapters.kernels.cuda.lora_launch import delta
from fader_adapters.kernels.cuda.lora_step import MAX_MEMBERS, DeltaSite, LoraStep, PhaseLaunch
from fader_adapters.kernels.cuda.lora_tables import (
    DECODE_TILE,
    PREFILL_TILE,
    TILE,
    Arch,
    SiteConfigs,
    arch_of,
    site_configs,
    unsplit,
)
from fader_adapters.kernels.cuda.step_layout import Capacity, StepLayout
from fader_adapters.kernels.cuda.tiles import CHUNK, LANES, StepTiles, TileBuilder
from fader_adapters.kernels.tables import Tables
from fader_adapters.spec import RowTerms, SiteSpec, StepTerms

__all__ = ["ROW_BUCKETS", "DeltaKernels", "DeltaSite", "LoraStep", "delta"]

ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
"""Rows of a decode step that may be captured, padded up to the next of these."""

LEAST = Capacity(4, 32, 256, 256, 256)
"""Room of the second set of buffers at first."""


@dataclass(slots=True)
class _Room:
    """Buffers and what they hold now."""

    buffers: StepBuffers
    rows: tuple[RowTerms, ...] | None = None
    step: LoraStep | None = None


class DeltaKernels:
    """Every delta of one model on one device.

    `bind` all sites first, then `prepare` once a step and `delta` at every site, all on one
    stream. Decode steps of at most `decode_rows` rows and `entries` 16-rank chunks live in buffers
    with fixed addresses, made by `reserve` (or the first `prepare`); all others live in a second
    set that `prepare` allocates and grows as needed.

    dtype    of activations and arena: bfloat16, float16 or float32
    arch     80 or 90; the device's own by default
    Raises KernelUnavailable for another dtype.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        arch: Arch | None = None,
        decode_rows: int = ROW_BUCKETS[-1],
        entries: int = 1024,
    ) -> None:
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise KernelUnavailable(
                f"the CUDA deltas compute in bfloat16, float16 or float32, not in {dtype}"
            )
        assert decode_rows in ROW_BUCKETS
        self._device = device
        self._dtype = dtype
        self._arch: Arch = arch or arch_of(*torch.cuda.get_device_capability(device))
        self._decode_rows = decode_rows
        self._entries = entries
        self._sites: list[DeltaSite] = []
        self._builder = TileBuilder(DECODE_TILE, PREFILL_TILE)
        self._tables = DeviceTables(device)
        self._shapes: tuple[torch.Tensor, torch.Tensor] | None = None
        self._fixed: _Room | None = None
        self._roomy: _Room | None = None

    @property
    def nbytes(self) -> int:
        """Resident bytes of the step buffers."""
        return sum(room.buffers.nbytes for room in (self._fixed, self._roomy) if room)

    def bind(self, site: SiteSpec, configs: SiteConfigs | None = None) -> DeltaSite:
        """Take a site in, before the first `reserve`; `configs` replaces the tables' choice.
        Raises BaseUnsupported for members that do not follow one another or are more than four.
        """
        members = len(site.linears)
        if members > MAX_MEMBERS or site.linears != tuple(
            range(site.linears[0], site.linears[0] + members)
        ):
            raise BaseUnsupported(
                f"a site's linears must be at most {MAX_MEMBERS} that follow one another, got "
                f"{site.linears}; split the site"
            )
        assert self._fixed is None
        bound = DeltaSite(
            site.linears[0],
            site.in_features,
            site.out_features,
            configs or site_configs(self._arch, site.in_features, sum(site.out_features)),
        )
        self._sites.append(bound)
        return bound

    def bind_lookup(self, site: SiteSpec) -> DeltaSite:
        """Take an embedding's site in: in is the vocabulary."""
        configs = site_configs(self._arch, site.in_features, sum(site.out_features))
        return self.bind(site, unsplit(configs))

    def reserve(self, tables: Tables) -> int:
        """Allocate the fixed buffers, once, before any capture; the bytes they take."""
        if self._fixed is None:
            tiles = -(-self._decode_rows // LANES)
            cells = self._entries + tiles * (DECODE_TILE.group - 1)
            cells = -(-cells // DECODE_TILE.group) * DECODE_TILE.group
            linears = tables.rank.shape[1]
            self._shapes = self._linear_shapes(linears)
            self._fixed = self._room(Capacity(tiles, 0, self._entries, cells, 0), linears)
        return self._fixed.buffers.nbytes

    def prepare(self, tables: Tables, terms: StepTerms) -> LoraStep | None:
        """Bring a step's metadata to the device; None when no row has anything to add.

        One host-to-device copy and one launch, none when rows and tables are those the buffers
        hold. Call it outside of a capture. Copies are ordered on the current stream.
        """
        if terms.idle:
            return None
        self.reserve(tables)
        if self._tables.refresh(tables):
            for room in (self._fixed, self._roomy):
                if room is not None:
                    room.rows = None
        for room in (self._fixed, self._roomy):
            if room is not None and room.rows == terms.rows:
                return room.step
        tiles = self._builder.build(terms, self._tables.chunks)
        if not tiles.entries:
            return None
        room = self._room_for(tiles, tables.rank.shape[1])
        room.buffers.fill(tiles)
        assert self._shapes is not None
        resolve(room.buffers, self._tables, self._shapes, entries=tiles.entries)
        room.rows = terms.rows
        has = self._tables.vectors
        vectors = any(has[slot] for row in terms.rows for slot, _ in row.terms)
        room.step = self._step(tiles, room, tables.arena, vectors=vectors)
        return room.step

    def blank(self, tables: Tables, rows: int | None, *, vectors: bool = False) -> LoraStep:
        """A step that adds nothing, over the buffers that real steps use.

        rows     a member of ROW_BUCKETS: launches and addresses of that bucket, for a capture;
                 None: those of a step with prefill rows, to have the kernels compiled
        vectors  launch what adapters with gains and biases need, too
        The last prepared step is no longer valid. Allocates like `prepare`, and has its kernel
        compiled: no first adapter waits for that.
        """
        self.reserve(tables)
        self._tables.refresh(tables)
        room = self._fixed
        if rows is None:
            room = self._roomy = self._roomy or self._room(LEAST, tables.rank.shape[1])
        assert room is not None
        assert rows is None or rows in ROW_BUCKETS
        room.rows = room.step = None
        buffers = room.buffers
        buffers.block.zero_()
        assert self._shapes is not None
        resolve(buffers, self._tables, self._shapes, entries=0)
        cells = buffers.capacity.decode_cells
        decode = PhaseLaunch("decode", buffers.decode, -(-(rows or 1) // LANES), cells)
        if rows is not None:
            return LoraStep(rows, rows, (decode,), buffers, tables.arena, vectors, covers=True)
        prefill = PhaseLaunch("prefill", buffers.prefill, 1, buffers.capacity.prefill_cells)
        return LoraStep(0, None, (decode, prefill), buffers, tables.arena, vectors)

    def _room_for(self, tiles: StepTiles, linears: int) -> _Room:
        assert self._fixed is not None
        fits = self._fixed.buffers.capacity.holds(tiles) and tiles.tokens <= self._decode_rows
        if fits:
            return self._fixed
        if self._roomy is None:
            self._roomy = self._room(LEAST.grown(tiles), linears)
        elif not self._roomy.buffers.capacity.holds(tiles):
            grown = self._roomy.buffers.capacity.grown(tiles)
            self._roomy = None
            self._roomy = self._room(grown, linears)
        return self._roomy

    def _room(self, capacity: Capacity, linears: int) -> _Room:
        scratch = 0
        for site in self._sites:
            for phase, shape in TILE.items():
                cells = capacity.decode_cells if phase == "decode" else capacity.prefill_cells
                planes = len(site.widths) * site.configs.shrink[phase].splits
                scratch = max(scratch, planes * cells * shape.rows * CHUNK)
        layout = StepLayout(capacity, PREFILL_TILE.rows)
        return _Room(StepBuffers(layout, DECODE_TILE.rows, linears, scratch, self._device))

    def _linear_shapes(self, linears: int) -> tuple[torch.Tensor, torch.Tensor]:
        width, out = [0] * linears, [0] * linears
        for site in self._sites:
            for member, columns in enumerate(site.widths):
                width[site.linear + member] = site.in_features
                out[site.linear + member] = columns
        return (
            torch.tensor(width, dtype=torch.int32, device=self._device),
            torch.tensor(out, dtype=torch.int32, device=self._device),
        )

    def _step(
        self, tiles: StepTiles, room: _Room, arena: torch.Tensor, *, vectors: bool
    ) -> LoraStep:
        buffers = room.buffers
        if room is self._fixed:
            bucket = next(rows for rows in ROW_BUCKETS if rows >= tiles.tokens)
            cells = buffers.capacity.decode_cells
            launch = PhaseLaunch("decode", buffers.decode, -(-bucket // LANES), cells)
            return LoraStep(tiles.tokens, bucket, (launch,), buffers, arena, vectors, tiles.covers)
        both = (
            PhaseLaunch("decode", buffers.decode, tiles.decode.tiles, tiles.decode.cells),
            PhaseLaunch("prefill", buffers.prefill, tiles.prefill.tiles, tiles.prefill.cells),
        )
        launches = tuple(launch for launch in both if launch.tiles)
        return LoraStep(tiles.tokens, None, launches, buffers, arena, vectors, tiles.covers)
