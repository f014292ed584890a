"""The deltas of one stack of experts in one step: two launches a piece. Keeps no state."""

from typing import Any

import torch

from fader_adapters.kernels.cuda import expert_kernels
from fader_adapters.kernels.cuda.expert_configs import (
    expand_constants,
    pairs_of_program,
    parts_of_list,
    shrink_constants,
)
from fader_adapters.kernels.cuda.lora_step import LoraStep, PhaseLaunch, StackSite
from fader_adapters.kernels.cuda.lora_tables import TILE
from fader_adapters.kernels.cuda.tiles import CHUNK
from fader_adapters.kernels.routing import Routing

# A launch passes torch tensors and compile options, which a kernel's own signature does not show.
_shrink_kernel: Any = expert_kernels.expert_shrink
_expand_kernel: Any = expert_kernels.expert_expand


def stack_delta(
    y: torch.Tensor, x: torch.Tensor, routing: Routing, site: StackSite, step: LoraStep
) -> None:
    """y[p] += Σᵢ γ[t,i]·s[slotᵢ]·(x[p]·A[slotᵢ,e]ᵀ)·B[slotᵢ,e], t and e being p's token and expert.

    y        [pairs, out] float, in the order of the routing, written in place; pairs without terms
             keep their bits
    x        [pairs, in]; in the arena's dtype it is multiplied as such, else in float32; both with
             unit column stride
    routing  of the step's tokens and of any padding behind them, on the device; nothing of it is
             read here
    Capturable with the step. Allocates the scratch between its launches.
    """
    assert y.shape == (x.shape[0], site.out_features)
    assert x.shape[1] == site.in_features
    assert x.stride(1) == y.stride(1) == 1
    for launch in step.launches:
        _phase(y, x, routing, site, step, launch)


def _phase(
    y: torch.Tensor,
    x: torch.Tensor,
    routing: Routing,
    site: StackSite,
    step: LoraStep,
    launch: PhaseLaunch,
) -> None:
    phase, at, buffers = launch.phase, launch.buffers, step.buffers
    shrink, expand = site.configs.shrink[phase], site.configs.expand[phase]
    exact = x.dtype != step.arena.dtype or x.dtype == torch.float32
    pairs = y.shape[0]
    block = pairs_of_program(phase, pairs, routing.experts)
    programs = -(-pairs // block)
    rows = routing.chosen * shrink.splits * launch.cells * TILE[phase].rows
    z = torch.empty(rows * CHUNK, dtype=torch.float32, device=y.device)
    worn = (routing.order, routing.expert, at.place, at.first, at.last, at.cell, buffers.gamma)
    counts = (pairs, block, routing.chosen, len(at.place))
    placed = (site.linear, buffers.left.shape[1], launch.cells)
    _shrink_kernel[(programs, shrink.splits, parts_of_list(programs))](
        x,
        step.arena,
        z,
        *worn,
        buffers.a_at,
        buffers.left,
        buffers.rank_at,
        *counts,
        site.in_features,
        x.stride(0),
        *placed,
        **shrink_constants(shrink, phase, exact=exact),
        num_warps=shrink.warps,
        num_stages=shrink.stages,
    )
    constants = expand_constants(expand, phase, splits=shrink.splits, exact=exact)
    _expand_kernel[(programs, -(-site.out_features // int(constants["BLOCK_N"])))](
        y,
        step.arena,
        z,
        *worn,
        buffers.b_at,
        buffers.left,
        buffers.rank_at,
        buffers.scale_at,
        *counts,
        site.out_features,
        y.stride(0),
        *placed,
        **constants,
        num_warps=expand.warps,
        num_stages=expand.stages,
    )
