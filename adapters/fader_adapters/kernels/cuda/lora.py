"""The batched delta on a GPU: which buffers a step lives in. Knows tables and rows, not models."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from fader_adapters.errors import BaseUnsupported, KernelUnavailable
from fader_adapters.kernels.cuda.expert_configs import expert_configs
from fader_adapters.kernels.cuda.lora_buffers import DeviceTables, PhaseBuffers, StepBuffers
from fader_adapters.kernels.cuda.lora_calls import resolve
from fader_adapters.kernels.cuda.lora_launch import delta
from fader_adapters.kernels.cuda.lora_rooms import (
    LEAST,
    Room,
    decode_capacity,
    prompt_capacity,
    prompt_tiles,
)
from fader_adapters.kernels.cuda.lora_step import (
    MAX_MEMBERS,
    DeltaSite,
    LoraStep,
    PhaseLaunch,
    StackSite,
)
from fader_adapters.kernels.cuda.lora_tables import (
    DECODE_TILE,
    PREFILL_TILE,
    TILE,
    SiteConfigs,
    site_configs,
    unsplit,
)
from fader_adapters.kernels.cuda.lora_tables import Phase as PhaseName
from fader_adapters.kernels.cuda.machines import Arch, arch_of
from fader_adapters.kernels.cuda.step_layout import Capacity, StepLayout
from fader_adapters.kernels.cuda.tiles import CHUNK, LANES, Phase, StepTiles, TileBuilder
from fader_adapters.kernels.tables import Tables
from fader_adapters.spec import SiteSpec, StepTerms

__all__ = ["ROW_BUCKETS", "DeltaKernels", "DeltaSite", "LoraStep", "delta"]

ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
"""Rows of a decode step that may be captured, padded up to the next of these."""


class DeltaKernels:
    """Every delta of one model on one device.

    `bind` all sites first, then `prepare` once a step and `delta` at every site, all on one
    stream. Decode steps of at most `decode_rows` rows and `entries` 16-rank chunks live in buffers
    with fixed addresses, made by `reserve` (or the first `prepare`), and so do those of few prompts
    after `reserve_prompts`; all others live in a last set that `prepare` allocates and grows as
    needed, its scratch up to what a piece of a step takes.

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
        self._arch: Arch = arch or arch_of(torch.cuda.get_device_capability(device))
        self._decode_rows = decode_rows
        self._entries = entries
        self._sites: list[DeltaSite] = []
        self._stacks: list[StackSite] = []
        self._stacked: Sequence[bool] = ()
        """Whether a slot changes any of them."""
        self._builder = TileBuilder(DECODE_TILE, PREFILL_TILE)
        self._tables = DeviceTables(device)
        self._shapes: tuple[torch.Tensor, torch.Tensor] | None = None
        self._fixed: Room | None = None
        self._prompts: Room | None = None
        self._prompt_buckets: Sequence[int] = ()
        self._roomy: Room | None = None

    @property
    def _rooms(self) -> list[Room]:
        return [room for room in (self._fixed, self._prompts, self._roomy) if room is not None]

    @property
    def nbytes(self) -> int:
        """Resident bytes of the step buffers."""
        return sum(room.buffers.nbytes for room in self._rooms)

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

    def bind_stack(self, site: SiteSpec) -> StackSite:
        """Take a stack of experts in, or a router: in and out are those of one expert."""
        (linear,), (out,) = site.linears, site.out_features
        assert self._fixed is None
        configs = expert_configs(self._arch)
        bound = StackSite(linear, site.in_features, out, configs)
        self._stacks.append(bound)
        return bound

    def reserve(self, tables: Tables) -> int:
        """Allocate the fixed buffers, once, before any capture; the bytes they take."""
        if self._fixed is None:
            linears = tables.rank.shape[1]
            self._shapes = self._linear_shapes(linears)
            self._fixed = self._room(decode_capacity(self._decode_rows, self._entries), linears)
        return self._fixed.buffers.nbytes

    def reserve_prompts(self, tables: Tables, buckets: Sequence[int]) -> None:
        """Allocate the fixed buffers of prompts, once, before any capture of those.

        buckets  tokens of such a step, padded up to the next of these, ascending
        """
        self.reserve(tables)
        if self._prompts is None and buckets:
            self._prompts = self._room(prompt_capacity(buckets[-1]), tables.rank.shape[1])
            self._prompt_buckets = buckets

    def prepare(self, tables: Tables, terms: StepTerms) -> LoraStep | None:
        """Bring a step's metadata to the device; None when no row has anything to add.

        One host-to-device copy and one launch, none when rows and tables are those the buffers
        hold. Call it outside of a capture. Copies are ordered on the current stream.
        """
        if terms.idle:
            return None
        self.reserve(tables)
        if self._refresh(tables):
            for room in self._rooms:
                room.rows = None
        for room in self._rooms:
            if room.rows == terms.rows:
                return room.step
        tiles = self._builder.build(
            terms, self._tables.chunks, padded=_bucket(len(terms.rows), self._decode_rows)
        )
        if not tiles.entries:
            return None
        room = self._room_for(tiles, tables.rank.shape[1])
        room.buffers.fill(tiles)
        assert self._shapes is not None
        resolve(room.buffers, self._tables, self._shapes, entries=tiles.entries)
        room.rows = terms.rows
        slots = {slot for row in terms.rows for slot, _ in row.terms}
        vectors = any(self._tables.vectors[slot] for slot in slots)
        stacks = any(self._stacked[slot] for slot in slots)
        step = self._step(tiles, room, tables.arena, vectors=vectors)
        room.step = replace(step, stacks=stacks, turn=room.buffers.turn)
        return room.step

    def _refresh(self, tables: Tables) -> bool:
        """Follow the tables; whether they changed."""
        changed = self._tables.refresh(tables)
        if changed:
            ranks = tables.rank[:, [stack.linear for stack in self._stacks]]
            self._stacked = ranks.any(dim=1).tolist()
        return changed

    def blank(
        self, tables: Tables, rows: int | None, *, vectors: bool = False, stacks: bool = False
    ) -> LoraStep:
        """A step that adds nothing, over the buffers that real steps use.

        rows     a member of ROW_BUCKETS: launches and addresses of that bucket, for a capture;
                 None: those of a step with prefill rows, to have the kernels compiled
        vectors  launch what adapters with gains and biases need, too
        stacks   and what those of experts and routers need
        The last prepared step is no longer valid. Allocates like `prepare`, and has its kernel
        compiled: no first adapter waits for that.
        """
        self.reserve(tables)
        room = self._fixed
        if rows is None:
            room = self._roomy = self._roomy or self._room(LEAST, tables.rank.shape[1])
        assert room is not None
        assert rows is None or rows in ROW_BUCKETS
        buffers = self._emptied(room, tables)
        cells = buffers.capacity.decode_cells
        decode = PhaseLaunch("decode", buffers.decode[0], -(-(rows or 1) // LANES), cells)
        if rows is not None:
            step = LoraStep(rows, rows, (decode,), buffers, tables.arena, vectors, covers=True)
            return replace(step, stacks=stacks, turn=buffers.turn)
        prefill = PhaseLaunch("prefill", buffers.prefill[0], 1, buffers.capacity.prefill_cells)
        step = LoraStep(0, None, (decode, prefill), buffers, tables.arena, vectors)
        return replace(step, stacks=stacks, turn=buffers.turn)

    def blank_prompt(
        self, tables: Tables, tokens: int, *, vectors: bool = False, stacks: bool = False
    ) -> LoraStep:
        """The same of a bucket of `reserve_prompts`, which comes first."""
        assert self._prompts is not None
        assert tokens in self._prompt_buckets
        buffers = self._emptied(self._prompts, tables)
        step = self._prompt_step(0, tokens, buffers, tables.arena, vectors=vectors)
        return replace(step, stacks=stacks, turn=buffers.turn)

    def _emptied(self, room: Room, tables: Tables) -> StepBuffers:
        """The room's buffers, with nothing to add in them."""
        self._refresh(tables)
        room.rows = room.step = None
        room.buffers.clear()
        assert self._shapes is not None
        resolve(room.buffers, self._tables, self._shapes, entries=0)
        return room.buffers

    def _room_for(self, tiles: StepTiles, linears: int) -> Room:
        assert self._fixed is not None
        fits = self._fixed.buffers.capacity.holds(tiles) and tiles.tokens <= self._decode_rows
        if fits:
            return self._fixed
        bucket, prompts = self._prompt_bucket(tiles.tokens), self._prompts
        few = bool(bucket) and tiles.prefill.tiles <= prompt_tiles(bucket)
        if prompts is not None and few and prompts.buffers.capacity.holds(tiles):
            return prompts
        if self._roomy is None:
            self._roomy = self._room(LEAST.grown(tiles), linears)
        elif not self._roomy.buffers.capacity.holds(tiles):
            grown = self._roomy.buffers.capacity.grown(tiles)
            self._roomy = None
            self._roomy = self._room(grown, linears)
        return self._roomy

    def _room(self, capacity: Capacity, linears: int) -> Room:
        scratch = 0
        for site in self._sites:
            for phase, shape in TILE.items():
                cells = capacity.decode_cells if phase == "decode" else capacity.prefill_cells
                planes = len(site.widths) * site.configs.shrink[phase].splits
                scratch = max(scratch, planes * cells * shape.rows * CHUNK)
        if not self._stacks:
            capacity = replace(capacity, tokens=0)
        layout = StepLayout(capacity, PREFILL_TILE.rows)
        return Room(StepBuffers(layout, DECODE_TILE.rows, linears, scratch, self._device))

    def _linear_shapes(self, linears: int) -> tuple[torch.Tensor, torch.Tensor]:
        width, out = [0] * linears, [0] * linears
        for site in self._sites:
            for member, columns in enumerate(site.widths):
                width[site.linear + member] = site.in_features
                out[site.linear + member] = columns
        for stack in self._stacks:
            width[stack.linear], out[stack.linear] = stack.in_features, stack.out_features
        return (
            torch.tensor(width, dtype=torch.int32, device=self._device),
            torch.tensor(out, dtype=torch.int32, device=self._device),
        )

    def _step(
        self, tiles: StepTiles, room: Room, arena: torch.Tensor, *, vectors: bool
    ) -> LoraStep:
        buffers = room.buffers
        if room is self._fixed:
            bucket = _bucket(tiles.tokens, self._decode_rows)
            cells = buffers.capacity.decode_cells
            launch = PhaseLaunch("decode", buffers.decode[0], -(-bucket // LANES), cells)
            return LoraStep(tiles.tokens, bucket, (launch,), buffers, arena, vectors, tiles.covers)
        if room is self._prompts:
            bucket = self._prompt_bucket(tiles.tokens)
            return self._prompt_step(tiles.tokens, bucket, buffers, arena, vectors=vectors)
        launches = (
            *_launches("decode", buffers.decode, tiles.decode),
            *_launches("prefill", buffers.prefill, tiles.prefill),
        )
        return LoraStep(tiles.tokens, None, launches, buffers, arena, vectors, tiles.covers)

    def _prompt_bucket(self, tokens: int) -> int:
        """0: none is large enough."""
        return next((size for size in self._prompt_buckets if size >= tokens), 0)

    def _prompt_step(
        self,
        tokens: int,
        bucket: int,
        buffers: StepBuffers,
        arena: torch.Tensor,
        *,
        vectors: bool,
    ) -> LoraStep:
        cells = buffers.capacity.prefill_cells
        launch = PhaseLaunch("prefill", buffers.prefill[0], prompt_tiles(bucket), cells)
        return LoraStep(tokens, None, (launch,), buffers, arena, vectors, prompt=bucket)


def _launches(
    phase: PhaseName, buffers: Sequence[PhaseBuffers], tiles: Phase
) -> Iterator[PhaseLaunch]:
    for at, piece in zip(buffers, tiles.pieces, strict=False):
        if piece.tiles:
            yield PhaseLaunch(phase, at, piece.tiles, piece.cells)


def _bucket(rows: int, most: int) -> int:
    """Rows that a decode step is padded to: as many as it has beyond the largest bucket."""
    return next((size for size in ROW_BUCKETS if rows <= size <= most), rows)
