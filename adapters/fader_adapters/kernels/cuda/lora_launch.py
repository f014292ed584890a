"""The launches of the delta kernels for one step and one site. Keeps no state."""

from dataclasses import dataclass
from typing import Any

import torch

from fader_adapters.kernels.cuda import lora_kernels as kernels
from fader_adapters.kernels.cuda import lora_lookup, lora_vectors
from fader_adapters.kernels.cuda.lora_buffers import DeviceTables, PhaseBuffers, StepBuffers
from fader_adapters.kernels.cuda.lora_configs import (
    PICK_PROGRAMS,
    PICK_WARPS,
    RESOLVE_BLOCK,
    RESOLVE_STAGES,
    RESOLVE_WARPS,
    TILE,
    VECTORS_STAGES,
    VECTORS_WARPS,
    Phase,
    SiteConfigs,
    expand_constants,
    pick_constants,
    shrink_constants,
    vectors_constants,
)

# A launch passes torch tensors and compile options, which a kernel's own signature does not show.
_resolve_kernel: Any = kernels.resolve
_shrink_kernel: Any = kernels.shrink
_expand_kernel: Any = kernels.expand
_vectors_kernel: Any = lora_vectors.vectors
_pick_kernel: Any = lora_lookup.pick

MAX_MEMBERS = 4
"""Linears of one site."""


@dataclass(frozen=True, slots=True)
class DeltaSite:
    """One site's shape and its launch configurations."""

    linear: int
    """Index of the first member; the others follow it."""
    in_features: int
    widths: tuple[int, ...]
    """Output columns of each member."""
    configs: SiteConfigs

    @property
    def out_features(self) -> int:
        return sum(self.widths)


@dataclass(frozen=True, slots=True)
class PhaseLaunch:
    """What one phase of a step launches: its buffers and the extent of its grids."""

    phase: Phase
    buffers: PhaseBuffers
    tiles: int
    cells: int


@dataclass(frozen=True, slots=True)
class LoraStep:
    """One step's delta metadata on the device, valid until the next `prepare`."""

    tokens: int
    bucket: int | None
    """Rows bucket of a step that may be captured or replayed: grids and addresses depend on it
    alone. None for a step with prefill rows, or with more rows or entries than the fixed room."""
    launches: tuple[PhaseLaunch, ...]
    buffers: StepBuffers
    arena: torch.Tensor
    vectors: bool = False
    """Whether a row may use an adapter with a gain or a bias: one launch more a phase."""


def delta(
    y: torch.Tensor,
    x: torch.Tensor,
    site: DeltaSite,
    step: LoraStep,
    bias: torch.Tensor | None = None,
) -> None:
    """y[t] += Σᵢ γ[t,i]·s[slotᵢ,m]·(x[t]·A[slotᵢ,m]ᵀ)·B[slotᵢ,m], two launches a phase.

    Where the step has vectors, y ← y + G∘(y − bias) + Σᵢ γ·s·biasB, G = Σᵢ γ·gain, comes first.
    y     [T, Σ out of the members], written in place; rows without terms keep their bits
    x     [T, in], y's dtype and the arena's; both with unit column stride
    bias  [Σ out], the base's own inside y, contiguous, any float dtype
    T is at least step.tokens; the rows past it (a bucket's padding) are neither read nor written.
    Capturable when step.bucket is not None. Allocates nothing.
    """
    assert x.shape[0] == y.shape[0] >= step.tokens
    assert (x.shape[1], y.shape[1]) == (site.in_features, site.out_features)
    assert x.stride(1) == y.stride(1) == 1
    assert x.dtype == y.dtype == step.arena.dtype
    for launch in step.launches:
        if step.vectors:
            _vectors(y, site, step, launch, bias)
        _shrink(x, site, step, launch)
        _expand(y, site, step, launch)


def lookup_delta(y: torch.Tensor, ids: torch.Tensor, site: DeltaSite, step: LoraStep) -> None:
    """y[t] += y[t]∘G + Σᵢ γ[t,i]·s[slotᵢ]·A[slotᵢ][:, ids[t]]ᵀ·B[slotᵢ], as `delta` for one-hot x.

    ids  [T] int64, below the site's in_features; the site's `shrink` must not be split
    """
    assert ids.shape[0] == y.shape[0] >= step.tokens
    assert y.stride(1) == 1
    assert y.dtype == step.arena.dtype
    for launch in step.launches:
        if step.vectors:
            _vectors(y, site, step, launch, None)
        _pick(ids, site, step, launch)
        _expand(y, site, step, launch)


def _pick(ids: torch.Tensor, site: DeltaSite, step: LoraStep, launch: PhaseLaunch) -> None:
    assert site.configs.shrink[launch.phase].splits == 1
    buffers, at = step.buffers, launch.buffers
    programs = min(PICK_PROGRAMS, launch.cells // TILE[launch.phase].group)
    _pick_kernel[(programs,)](
        ids,
        step.arena,
        buffers.z,
        at.header,
        at.tokens,
        at.first,
        at.last,
        at.cell,
        buffers.a_at,
        buffers.left,
        site.in_features,
        site.linear,
        buffers.left.shape[1],
        at.cells,
        **pick_constants(launch.phase),
        num_warps=PICK_WARPS,
        num_stages=1,
    )


def _shrink(x: torch.Tensor, site: DeltaSite, step: LoraStep, launch: PhaseLaunch) -> None:
    config = site.configs.shrink[launch.phase]
    buffers, at = step.buffers, launch.buffers
    programs = min(config.programs, launch.cells // TILE[launch.phase].group)
    _shrink_kernel[(programs, config.splits, len(site.widths))](
        x,
        step.arena,
        buffers.z,
        at.header,
        at.tokens,
        at.first,
        at.last,
        at.cell,
        buffers.a_at,
        buffers.left,
        site.in_features,
        x.stride(0),
        site.linear,
        buffers.left.shape[1],
        at.cells,
        **shrink_constants(config, launch.phase, exact=x.dtype == torch.float32),
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _expand(y: torch.Tensor, site: DeltaSite, step: LoraStep, launch: PhaseLaunch) -> None:
    config = site.configs.expand[launch.phase]
    splits = site.configs.shrink[launch.phase].splits
    exact = y.dtype == torch.float32
    constants = expand_constants(config, launch.phase, splits=splits, exact=exact)
    buffers, at = step.buffers, launch.buffers
    blocks = sum(-(-width // config.block_n) for width in site.widths)
    _expand_kernel[(blocks, launch.tiles)](
        y,
        step.arena,
        buffers.z,
        at.header,
        at.tokens,
        at.first,
        at.last,
        at.cell,
        buffers.gamma,
        buffers.b_at,
        buffers.left,
        buffers.scale_at,
        *site.widths,
        *(0,) * (MAX_MEMBERS - len(site.widths)),
        y.stride(0),
        site.linear,
        buffers.left.shape[1],
        at.cells,
        **constants,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _vectors(
    y: torch.Tensor,
    site: DeltaSite,
    step: LoraStep,
    launch: PhaseLaunch,
    bias: torch.Tensor | None,
) -> None:
    constants = vectors_constants(launch.phase, bias=bias is not None)
    buffers, at = step.buffers, launch.buffers
    blocks = sum(-(-width // int(constants["BLOCK_N"])) for width in site.widths)
    _vectors_kernel[(blocks, launch.tiles)](
        y,
        y if bias is None else bias,
        step.arena,
        at.header,
        at.tokens,
        at.first,
        at.last,
        buffers.gamma,
        buffers.gain_at,
        buffers.bias_at,
        buffers.scale_at,
        *site.widths,
        *(0,) * (MAX_MEMBERS - len(site.widths)),
        y.stride(0),
        site.linear,
        buffers.left.shape[1],
        **constants,
        num_warps=VECTORS_WARPS,
        num_stages=VECTORS_STAGES,
    )


def resolve(
    buffers: StepBuffers,
    tables: DeviceTables,
    shapes: tuple[torch.Tensor, torch.Tensor],
    *,
    entries: int,
) -> None:
    """Look the step's entries up at every linear; none: have the kernel compiled and loaded.

    shapes: (in, out) features [linears] int32
    """
    linears, capacity = buffers.left.shape
    _resolve_kernel[(-(-max(1, entries) // RESOLVE_BLOCK), linears)](
        buffers.slot,
        buffers.chunk,
        tables.a_offset,
        tables.b_offset,
        tables.gain_offset,
        tables.bias_offset,
        tables.rank,
        tables.scale,
        *shapes,
        buffers.a_at,
        buffers.b_at,
        buffers.gain_at,
        buffers.bias_at,
        buffers.left,
        buffers.scale_at,
        entries,
        linears,
        capacity,
        BLOCK=RESOLVE_BLOCK,
        num_warps=RESOLVE_WARPS,
        num_stages=RESOLVE_STAGES,
    )
