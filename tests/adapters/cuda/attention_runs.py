"""Runs one packed step of a World through the Triton kernels, everything else poisoned."""

from typing import Any

import torch
from torch import Tensor

from fader_adapters.kernels.cuda.attention import PagedAttention, Scratch
from fader_adapters.kernels.cuda.attention_step import AttentionStep
from tests.adapters.cuda.attention_world import World


class Poisoned(Scratch):
    """Partial sums nobody wrote are NaN."""

    def planes(self, *, rows: int, heads: int, dim: int, splits: int) -> tuple[Tensor, Tensor]:
        planes, stats = super().planes(rows=rows, heads=heads, dim=dim, splits=splits)
        return planes.fill_(torch.nan), stats.fill_(torch.nan)


def kernel(world: World, **changes: Any) -> PagedAttention:
    shape = world.shape
    settings: dict[str, Any] = {
        "scale": shape.scale,
        "window": shape.window,
        "softcap": shape.softcap,
        "sinks": shape.sink_scores,
    }
    settings |= changes
    scratch = Poisoned(shape.device)
    return PagedAttention(world.k, world.v, heads=shape.heads, scratch=scratch, **settings)


def step(world: World, *, context: int = 0, tokens: int = 0) -> AttentionStep:
    """The world's step; capacities beyond its own on request."""
    return AttentionStep(
        cu_tokens=world.ints(world.starts),
        contexts=world.ints(world.contexts),
        block_tables=world.table_tensor(),
        tokens=max(tokens, world.starts[-1]),
        context=max(context, *world.contexts),
        decodes=True,
        prefills=any(row.q.shape[0] > 1 for row in world.rows),
    )


def attend(
    world: World, *, context: int = 0, tokens: int = 0, q: Tensor | None = None, **changes: Any
) -> list[Tensor]:
    """Each row's outputs; whatever was not written is NaN."""
    queries = world.q if q is None else q
    out = torch.full(queries.shape, torch.nan, dtype=queries.dtype, device=queries.device)
    kernel(world, **changes)(queries, step(world, context=context, tokens=tokens), out=out)
    counts = [row.q.shape[0] for row in world.rows]
    return list(out[: sum(counts)].split(counts))
