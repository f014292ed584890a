"""Where each slot's matrices and vectors lie in the arena. Filled by the pool, read by kernels."""

from collections.abc import Iterable

import torch

from fader_adapters.spec import AdapterSpec

GROWTH = 64
"""Slots at first; then their number doubles, so that one more slot costs the same on average."""


class Tables:
    """Per (slot, linear): offsets in the arena, −1 where unused, and rank and scale, 0 there.

    arena    [elements]          the adapters' weights, one dtype, one device
    a_offset [slots, linears]    int64, elements from the arena's start to A [rank, in]
    b_offset [slots, linears]    int64, elements from the arena's start to B [rank, out]
    gain_offset [slots, linears] int64, elements from the arena's start to the gain [out]
    bias_offset [slots, linears] int64, elements from the arena's start to the bias of B [out]
    rank     [slots, linears]    int32
    scale    [slots, linears]    float32
    The tables are host tensors; `generation` counts changes, so a backend knows when its own
    copy is stale. Owned by the engine thread.
    """

    def __init__(self, arena: torch.Tensor, linears: int) -> None:
        self.arena = arena
        self.generation = 0
        self.a_offset = torch.full((0, linears), -1, dtype=torch.int64)
        self.b_offset = torch.full((0, linears), -1, dtype=torch.int64)
        self.gain_offset = torch.full((0, linears), -1, dtype=torch.int64)
        self.bias_offset = torch.full((0, linears), -1, dtype=torch.int64)
        self.rank = torch.zeros((0, linears), dtype=torch.int32)
        self.scale = torch.zeros((0, linears), dtype=torch.float32)

    @property
    def slots(self) -> int:
        return self.rank.shape[0]

    def publish(self, slot: int, spec: AdapterSpec, offset: int) -> None:
        """Make `slot` stand for an adapter whose extent starts at element `offset`."""
        while slot >= self.slots:
            self._grow()
        self._clear(slot)
        deltas = spec.deltas
        place = torch.tensor([delta.linear for delta in deltas], dtype=torch.int64)

        def put(table: torch.Tensor, values: Iterable[float]) -> None:
            table[slot, place] = torch.tensor(tuple(values), dtype=table.dtype)

        def put_offsets(table: torch.Tensor, own: Iterable[int | None]) -> None:
            put(table, (-1 if at is None else offset + at for at in own))

        put_offsets(self.a_offset, (delta.a_offset for delta in deltas))
        put_offsets(self.b_offset, (delta.b_offset for delta in deltas))
        put_offsets(self.gain_offset, (delta.gain_offset for delta in deltas))
        put_offsets(self.bias_offset, (delta.bias_offset for delta in deltas))
        put(self.rank, (delta.rank for delta in deltas))
        put(self.scale, (delta.scale for delta in deltas))
        self.generation += 1

    def retract(self, slot: int) -> None:
        """Empty `slot`; its rows in the arena may be reused afterwards."""
        self._clear(slot)
        self.generation += 1

    def _clear(self, slot: int) -> None:
        self.a_offset[slot].fill_(-1)
        self.b_offset[slot].fill_(-1)
        self.gain_offset[slot].fill_(-1)
        self.bias_offset[slot].fill_(-1)
        self.rank[slot].zero_()
        self.scale[slot].zero_()

    def _grow(self) -> None:
        more, linears = max(GROWTH, self.slots), self.rank.shape[1]
        gap = torch.full((more, linears), -1, dtype=torch.int64)
        self.a_offset = torch.cat([self.a_offset, gap])
        self.b_offset = torch.cat([self.b_offset, gap])
        self.gain_offset = torch.cat([self.gain_offset, gap])
        self.bias_offset = torch.cat([self.bias_offset, gap])
        self.rank = torch.cat([self.rank, torch.zeros((more, linears), dtype=torch.int32)])
        self.scale = torch.cat([self.scale, torch.zeros((more, linears))])
