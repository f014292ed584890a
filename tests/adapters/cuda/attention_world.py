"""Rows of a paged cache whose every other place is NaN, and dense float64 attention over them."""

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FOREIGN = 1 << 29
"""A block number no cache has: reading through it faults or lands far away."""


@dataclass(frozen=True)
class Shape:
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    page: int = 16
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = DEVICE

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    @property
    def sink_scores(self) -> Tensor | None:
        """[heads] between the least and the most of what keys score, or none."""
        scores = torch.linspace(-2.0, 6.0, self.heads).to(self.dtype).to(self.device)
        return scores if self.sinks else None


@dataclass(frozen=True)
class Row:
    """One sequence: k and v [context, kv_heads, dim], q [count, heads, dim] its last queries."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def context(self) -> int:
        return self.k.shape[0]


def make_row(shape: Shape, count: int, context: int, seed: int) -> Row:
    """Equal arguments make an equal row; a longer context or count extends the shorter."""
    parts = []
    for part, heads in enumerate((shape.heads, shape.kv_heads, shape.kv_heads)):
        generator = torch.Generator().manual_seed(seed * 3 + part)
        drawn = torch.randn(context, heads, shape.dim, generator=generator)
        parts.append(drawn.to(shape.dtype).to(shape.device))
    q, k, v = parts
    return Row(q[context - count :] * 2, k, v)


@dataclass(frozen=True)
class World:
    """Rows packed into one step over caches of their own, shuffled blocks, NaN elsewhere."""

    shape: Shape
    rows: list[Row]
    spare: int = 2
    """Columns of the block tables past the widest row, all foreign."""
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)
    tables: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        page = self.shape.page
        widths = [-(-row.context // page) for row in self.rows]
        blocks = sum(widths) + 2
        order = iter(torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).tolist())
        tables = [list(itertools.islice(order, width)) for width in widths]
        place = (blocks, page, self.shape.kv_heads, self.shape.dim)
        k = torch.full(place, torch.nan, dtype=self.shape.dtype, device=self.shape.device)
        v = k.clone()
        for row, table in zip(self.rows, tables, strict=True):
            slots = self.places(table, row.context)
            k.view(-1, *place[2:])[slots], v.view(-1, *place[2:])[slots] = row.k, row.v
        for name, value in (("k", k), ("v", v), ("tables", tables)):
            object.__setattr__(self, name, value)

    def places(self, table: list[int], context: int) -> Tensor:
        p = torch.arange(context)
        return (torch.tensor(table)[p // self.shape.page] * self.shape.page) + p % self.shape.page

    @property
    def q(self) -> Tensor:
        return torch.cat([row.q for row in self.rows])

    @property
    def starts(self) -> list[int]:
        return [0, *itertools.accumulate(row.q.shape[0] for row in self.rows)]

    @property
    def contexts(self) -> list[int]:
        return [row.context for row in self.rows]

    def table_tensor(self) -> Tensor:
        width = max(map(len, self.tables)) + self.spare
        padded = [table + [FOREIGN] * (width - len(table)) for table in self.tables]
        return torch.tensor(padded, dtype=torch.int32, device=self.shape.device)

    def ints(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.shape.device)


def dense(shape: Shape, row: Row) -> Tensor:
    """softmax(cap(q·k·scale) where visible)·v in float64, [count, heads, dim]."""
    group = shape.heads // shape.kv_heads
    k, v = (part.double().repeat_interleave(group, dim=1) for part in (row.k, row.v))
    scores = torch.einsum("qhd,khd->hqk", row.q.double(), k) * shape.scale
    if shape.softcap:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    count = row.q.shape[0]
    position = torch.arange(row.context - count, row.context, device=row.q.device)[:, None]
    key = torch.arange(row.context, device=row.q.device)[None]
    hidden = key > position
    if shape.window:
        hidden |= key <= position - shape.window
    scores = scores.masked_fill(hidden, -torch.inf)
    if shape.sink_scores is not None:
        sinks = shape.sink_scores.double()[:, None, None].expand(-1, count, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : row.context], v)


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference in units of the largest value; NaN stays NaN and fails every `<`."""
    return ((got.double() - want).abs().max() / want.abs().max()).item()
