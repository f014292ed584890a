"""The launches of the delta kernels: which argument is which. Decides nothing, keeps no state."""

from typing import Any

import torch

from fader_adapters.kernels.cuda import lora_expand, lora_kernels, lora_lookup, lora_vectors
from fader_adapters.kernels.cuda.lora_buffers import DeviceTables, PhaseBuffers, StepBuffers
from fader_adapters.kernels.cuda.lora_configs import (
    PICK_PROGRAMS,
    PICK_WARPS,
    RESOLVE_BLOCK,
    RESOLVE_STAGES,
    RESOLVE_WARPS,
    VECTORS_STAGES,
    VECTORS_WARPS,
    expand_constants,
    join_constants,
    pick_constants,
    shrink_constants,
    vectors_constants,
)
from fader_adapters.kernels.cuda.lora_step import MAX_MEMBERS, DeltaSite, LoraStep, PhaseLaunch
from fader_adapters.kernels.cuda.lora_tables import JOIN, TILE

# A launch passes torch tensors and compile options, which a kernel's own signature does not show.
_resolve_kernel: Any = lora_kernels.resolve
_shrink_kernel: Any = lora_kernels.shrink
_expand_kernel: Any = lora_expand.expand
_vectors_kernel: Any = lora_vectors.vectors
_pick_kernel: Any = lora_lookup.pick
_join_kernel: Any = lora_expand.join


def pick(ids: torch.Tensor, site: DeltaSite, step: LoraStep, launch: PhaseLaunch) -> None:
    """z from token ids [T] int64; the site's planes must not be split."""
    assert site.configs.shrink[launch.phase].splits == 1
    buffers, at = step.buffers, launch.buffers
    programs = min(PICK_PROGRAMS, launch.cells // TILE[launch.phase].group)
    _pick_kernel[(programs,)](
        ids,
        *_listed(step, at),
        buffers.a_at,
        buffers.left,
        site.in_features,
        *_placed(site, step, at),
        **pick_constants(launch.phase),
        num_warps=PICK_WARPS,
        num_stages=1,
    )


def shrink(x: torch.Tensor, site: DeltaSite, step: LoraStep, launch: PhaseLaunch) -> None:
    """z from x [T, in]."""
    assert x.shape[0] >= step.tokens
    assert x.shape[1] == site.in_features
    assert x.stride(1) == 1
    assert x.dtype == step.arena.dtype
    config = site.configs.shrink[launch.phase]
    buffers, at = step.buffers, launch.buffers
    programs = min(config.programs, launch.cells // TILE[launch.phase].group)
    _shrink_kernel[(programs, config.splits, len(site.widths))](
        x,
        *_listed(step, at),
        buffers.a_at,
        buffers.left,
        site.in_features,
        x.stride(0),
        *_placed(site, step, at),
        **shrink_constants(config, launch.phase, exact=x.dtype == torch.float32),
        num_warps=config.warps,
        num_stages=config.stages,
    )


def expand(y: torch.Tensor, site: DeltaSite, step: LoraStep, launch: PhaseLaunch) -> None:
    """z into y [T, Σ out]."""
    config = site.configs.expand[launch.phase]
    splits = site.configs.shrink[launch.phase].splits
    exact = y.dtype == torch.float32
    constants = expand_constants(config, launch.phase, splits=splits, exact=exact)
    at = launch.buffers
    _expand_kernel[(_blocks(site, config.block_n), launch.tiles)](
        y,
        *_listed(step, at),
        *_weighed(step),
        *_widths(site),
        y.stride(0),
        *_placed(site, step, at),
        **constants,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def join(
    planes: torch.Tensor,
    out: torch.Tensor,
    site: DeltaSite,
    step: LoraStep,
    launch: PhaseLaunch,
    bias: torch.Tensor | None,
) -> None:
    """z and planes [P, T, Σ out] float32 into out [T, Σ out]."""
    constants = join_constants(
        planes=len(planes),
        splits=site.configs.shrink[launch.phase].splits,
        bias=bias is not None,
        exact=out.dtype == torch.float32,
    )
    at = launch.buffers
    _join_kernel[(_blocks(site, JOIN.block_n), launch.tiles)](
        out,
        planes,
        out if bias is None else bias,
        *_listed(step, at),
        *_weighed(step),
        *_widths(site),
        out.shape[1],
        out.shape[0],
        *_placed(site, step, at),
        **constants,
        num_warps=JOIN.warps,
        num_stages=JOIN.stages,
    )


def vectors(
    parts: torch.Tensor,
    site: DeltaSite,
    step: LoraStep,
    launch: PhaseLaunch,
    bias: torch.Tensor | None,
) -> None:
    """parts: [1, T, Σ out], a result with `bias` inside, or [P, T, Σ out], its planes without."""
    constants = vectors_constants(launch.phase, bias=bias is not None)
    buffers, at = step.buffers, launch.buffers
    _vectors_kernel[(_blocks(site, int(constants["BLOCK_N"])), launch.tiles)](
        parts,
        parts if bias is None else bias,
        step.arena,
        at.header,
        at.tokens,
        at.first,
        at.last,
        buffers.gamma,
        buffers.gain_at,
        buffers.bias_at,
        buffers.scale_at,
        *_widths(site),
        parts.stride(1),
        len(parts),
        parts.stride(0),
        site.linear,
        buffers.left.shape[1],
        **constants,
        num_warps=VECTORS_WARPS,
        num_stages=VECTORS_STAGES,
    )


def _listed(step: LoraStep, at: PhaseBuffers) -> tuple[torch.Tensor, ...]:
    """arena, z, header, tokens, first, last, cell: what every kernel over tiles begins with."""
    return step.arena, step.buffers.z, at.header, at.tokens, at.first, at.last, at.cell


def _weighed(step: LoraStep) -> tuple[torch.Tensor, ...]:
    """gamma, b_at, left, scale_at: what the second half multiplies with."""
    buffers = step.buffers
    return buffers.gamma, buffers.b_at, buffers.left, buffers.scale_at


def _placed(site: DeltaSite, step: LoraStep, at: PhaseBuffers) -> tuple[int, int, int]:
    """linear, capacity, cells: what places are counted by."""
    return site.linear, step.buffers.left.shape[1], at.cells


def _blocks(site: DeltaSite, columns: int) -> int:
    """Programs that cover the columns of every member, so many each."""
    return sum(-(-width // columns) for width in site.widths)


def _widths(site: DeltaSite) -> tuple[int, ...]:
    """Columns of four members, 0 for those that are not there."""
    return (*site.widths, *(0,) * (MAX_MEMBERS - len(site.widths)))


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
        buffers.rank_at,
        buffers.scale_at,
        entries,
        linears,
        capacity,
        BLOCK=RESOLVE_BLOCK,
        num_warps=RESOLVE_WARPS,
        num_stages=RESOLVE_STAGES,
    )
