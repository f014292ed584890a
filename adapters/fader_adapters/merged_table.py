"""The embedding on its way into a merged lane: what it gives for every token, with the delta."""

from collections.abc import Callable

import torch

from fader_adapters.changes import Change
from fader_adapters.kernels.dense import EmbeddingTable
from fader_adapters.merged_site import chunk_rows, loss_of, rounded
from fader_adapters.pauses import Pause
from fader_adapters.spec import LinearSpec
from fader_adapters.weightspace.loss import LinearLoss, joined


class TableWork:
    """Chunks of tokens in, one table out, in the dtype of the base's."""

    def __init__(
        self,
        base: EmbeddingTable,
        linear: LinearSpec,
        change: Change,
        *,
        device: torch.device,
    ) -> None:
        self._base = base
        self._linear = linear
        self._change = change
        shape = (linear.in_features, linear.out_features)
        self._table = torch.empty(shape, dtype=base.plain_dtype, device=device)
        self._parts: list[LinearLoss] = []

    def run(self, pause: Pause, told: Callable[[int], None]) -> torch.Tensor:
        """[tokens, width]; `told` hears the weights of each chunk once it is done. Raises
        CheckpointInvalid (NaN or Inf)."""
        table, rank = self._table, self._change.delta.rank
        for ids in torch.arange(len(table)).split(chunk_rows(table.shape[1], table.device)):
            given = self._base.lookup(ids.to(table.device)).float().cpu()
            wanted = self._change.of_lookup(given, ids)
            kept, made = rounded(table.dtype, table.device, wanted)
            table[ids[0] : ids[-1] + 1] = kept
            self._parts.append(loss_of(self._linear.path, rank, given, wanted, made))
            pause()
            told(given.numel())
        return table

    @property
    def loss(self) -> LinearLoss:
        """What rounding cost, once it is done."""
        return joined(self._parts)
