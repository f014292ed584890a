"""Random weights, adapters and steps to measure with. Knows layouts, no clocks."""

import torch

from fader_adapters.kernels import native


def quantised(n: int, k: int) -> tuple[native.Nf4Panels, torch.Tensor, torch.Tensor]:
    """W [n, k] as panels, and the packed bytes and absmax it was made of."""
    made = native.quantise_nf4(torch.randn(n, k))
    assert made.absmax is not None
    return native.Nf4Panels.from_bnb(made.packed, made.absmax, n, k), made.packed, made.absmax


def copies(weight: native.Nf4Panels, streamed: int) -> list[native.Nf4Panels]:
    """At least two of `weight`, `streamed` bytes together, in huge pages as a model keeps them."""
    store = native.PanelStore()
    made = []
    for _ in range(max(2, streamed // weight.nbytes)):
        panels = store.take(weight.panels.nbytes).view_as(weight.panels).copy_(weight.panels)
        scales = store.take(weight.scales.nbytes).view(torch.float32).view_as(weight.scales)
        made.append(native.Nf4Panels(panels, scales.copy_(weight.scales), weight.n, weight.k))
    return made


def adapters(slots: int, rank: int, n: int, k: int) -> native.SiteTables:
    """`slots` random bf16 adapters of one rank for one linear."""
    size = rank * (n + k)
    a_off = torch.arange(slots)[:, None] * size
    ranks = torch.full((slots, 1), rank, dtype=torch.int32)
    arena = (torch.randn(slots * size) * 0.02).bfloat16()
    return native.SiteTables(arena, a_off, a_off + rank * k, ranks, torch.ones(slots, 1), [(0, n)])


def step(blends: list[list[tuple[int, float]]], *, slots: int) -> native.StepPlan:
    """One token a row."""
    return native.StepPlan.of(blends, list(range(len(blends))), slots=slots)


def cache(rows: int, context: int, *, kv_heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A bf16 cache [2, blocks, 16, kv_heads, dim] and block tables int32 [rows, columns]."""
    columns = -(-context // 16)
    keys_values = torch.randn(2, rows * columns, 16, kv_heads, dim).bfloat16()
    return keys_values, torch.randperm(rows * columns).int().reshape(rows, columns)
