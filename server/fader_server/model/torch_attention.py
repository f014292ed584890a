"""Paged attention in plain torch: gathers each row's keys, computes in fp32. Runs anywhere."""

from dataclasses import dataclass

import torch

from fader_server.model.attention import AttentionParams
from fader_server.model.batch import Batch
from fader_server.model.kv_cache import LayerCache

MIN_BUCKET = 64
"""Keys of the smallest bucket."""


@dataclass(frozen=True)
class Group:
    """Rows with the same number of queries whose contexts fall into one bucket of L keys.

    The bucket depends on a row's own context alone, so its arithmetic does too.
    """

    queries: torch.Tensor
    """[B, n] packed token indices."""
    keys: torch.Tensor
    """[B, L] places in the flat cache; the null block where a context has ended."""
    ended: torch.Tensor
    """[B, L] whether it has. What the null block holds is selected away: 0 · NaN is NaN."""
    distance: torch.Tensor
    """[B, n, L] query position − key position; negative: the future."""


class TorchAttention:
    """The reference implementation of PagedAttention."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size

    def prepare(self, batch: Batch) -> list[Group]:
        """One group a row on the CPU, whose batched products round by the size of the batch."""
        members: dict[tuple[int, int, int], list[int]] = {}
        for i, row in enumerate(batch.rows):
            apart = i if batch.slots.device.type == "cpu" else 0
            members.setdefault((row.count, _bucket(row.context), apart), []).append(i)
        return [self._group(batch, rows, *key[:2]) for key, rows in members.items()]

    def _group(self, batch: Batch, rows: list[int], count: int, width: int) -> Group:
        device = batch.slots.device
        begins = torch.tensor([batch.rows[i].begin for i in rows], device=device)
        contexts = batch.contexts[torch.tensor(rows, device=device)].long()
        place = torch.arange(width, device=device)
        inside = place < contexts[:, None]  # [B, L]
        column = (place // self._block_size).clamp(max=batch.block_tables.shape[1] - 1)
        blocks = batch.block_tables[torch.tensor(rows, device=device)][:, column].long()
        keys = torch.where(inside, blocks * self._block_size + place % self._block_size, 0)
        steps = torch.arange(count, device=device)
        positions = contexts[:, None] - count + steps  # [B, n]
        distance = positions[:, :, None] - place
        return Group(begins[:, None] + steps, keys, ~inside, distance)

    def write(
        self, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor
    ) -> None:
        cache.k.flatten(0, 1).index_copy_(0, slots, k)
        cache.v.flatten(0, 1).index_copy_(0, slots, v)

    def attend(
        self, q: torch.Tensor, cache: LayerCache, params: AttentionParams, step: object
    ) -> torch.Tensor:
        assert isinstance(step, list)
        out = q.new_empty(*q.shape[:2], cache.v.shape[-1])
        k_flat, v_flat = cache.k.flatten(0, 1), cache.v.flatten(0, 1)
        for group in step:
            rows = q[group.queries].float()  # [B, n, heads, d]
            k, v = k_flat[group.keys].float(), v_flat[group.keys].float()  # [B, L, kv_heads, d]
            v = v.masked_fill(group.ended[..., None, None], 0.0)
            out[group.queries] = _attend(rows, k, v, group.distance, params).to(q.dtype)
        return out


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    distance: torch.Tensor,
    params: AttentionParams,
) -> torch.Tensor:
    batch, count, heads, width = q.shape
    kv_heads = k.shape[2]
    grouped = q.view(batch, count, kv_heads, heads // kv_heads, width)
    products = torch.einsum("bnkgd,blkd->bkgnl", grouped, k)
    weights = params.weights(products, distance[:, None, None])
    return torch.einsum("bkgnl,blkd->bnkgd", weights, v).reshape(batch, count, heads, -1)


def _bucket(context: int) -> int:
    """The power of two that holds the context, at least MIN_BUCKET."""
    return max(MIN_BUCKET, 1 << (context - 1).bit_length())
