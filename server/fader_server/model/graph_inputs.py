"""The tensors of decode steps at fixed addresses on a device. Knows plans, no kernels."""

from collections.abc import Sequence

import numpy as np
import torch

from fader_adapters.kernels.native import StateRows
from fader_server.core import Plan
from fader_server.model.batch import AttentionRow, Batch, Places
from fader_server.model.state_slots import NOBODY


class Mirror:
    """Integers on the host, pinned, and their copy on the device; neither ever moves."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(size, dtype=dtype, pin_memory=on_gpu)
        self.device = torch.zeros(size, dtype=dtype, device=device)
        self._copied = torch.cuda.Event() if on_gpu else None

    def open(self) -> np.ndarray:
        """The host's side, to be written: the last copy has read it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.numpy()

    def send(self, start: int, stop: int) -> None:
        """Copy [start, stop) in order on the current stream; waits for nothing."""
        self.device[start:stop].copy_(self._host[start:stop], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


class GraphInputs:
    """One step of up to `rows` rows of one token, each of up to `context` keys.

    A row of padding has token 0, position 0, no keys and slot −1, so it stores nothing and attends
    to nothing; its state comes from nobody and goes nowhere. Rows past a bucket hold whatever an
    earlier step left: a bucket never reads them.
    """

    def __init__(
        self,
        *,
        rows: int,
        context: int,
        block_size: int,
        device: torch.device,
        states: Places | None = None,
    ) -> None:
        """Allocates, on the host too. states: of a base whose layers keep some."""
        self._rows = rows
        self._states = states
        self._context = context
        self._block_size = block_size
        self._columns = -(-context // block_size)
        self._words = Mirror(5 * rows, torch.int64, device)
        self._blocks = Mirror(rows * self._columns, torch.int32, device)
        self._sent: list[list[int]] = [[] for _ in range(rows)]
        """The blocks of each row that the device knows."""
        words = self._words.device
        self._ids, self._positions, self._slots, contexts, kept = words.view(5, rows)
        self._contexts = contexts.view(torch.int32)[:rows]
        self._came_from, self._to = kept.view(torch.int32).view(2, rows)
        self._tables = self._blocks.device.view(rows, self._columns)
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._index = torch.arange(rows, device=device)
        self._device = device
        self._words.open().reshape(5, rows)[[2, 4]] = -1
        self._words.send(0, 5 * rows)

    def fill(self, plan: Plan, bucket: int, tokens: torch.Tensor | None = None) -> None:
        """Send the plan's rows, one token each, and padding up to `bucket` rows.

        tokens  [rows] int64, on the device: those that the rows' sequences do not hold yet
        """
        rows, size = plan.rows, self._block_size
        n = len(rows)
        starts = [row.start for row in rows]
        blocks = [row.sequence.blocks for row in rows]
        words = self._words.open().reshape(5, self._rows)
        words[:2, n:bucket] = 0
        if tokens is None:
            words[0, :n] = [row.tokens[0] for row in rows]
        words[1, :n] = starts
        words[2, n:bucket] = -1
        words[2, :n] = [
            own[at // size] * size + at % size for own, at in zip(blocks, starts, strict=True)
        ]
        contexts = words[3].view(np.int32)
        contexts[n:bucket] = 0
        contexts[:n] = [at + 1 for at in starts]
        if self._states is not None:
            kept = words[4].view(np.int32).reshape(2, self._rows)
            kept[:, :n] = self._states(plan)
            kept[:, n:bucket] = NOBODY
        self._words.send(0, 5 * self._rows)
        if tokens is not None:
            self._ids[:n].copy_(tokens)
        self._send_blocks([own[: at // size + 1] for own, at in zip(blocks, starts, strict=True)])

    def _send_blocks(self, blocks: Sequence[list[int]]) -> None:
        """Rows from the first that changed to the last."""
        changed = [i for i, own in enumerate(blocks) if own != self._sent[i]]
        if not changed:
            return
        tables = self._blocks.open().reshape(self._rows, self._columns)
        for i in changed:
            tables[i, : len(blocks[i])] = blocks[i]
            self._sent[i] = blocks[i]
        self._blocks.send(changed[0] * self._columns, (changed[-1] + 1) * self._columns)

    def batch(self, rows: int) -> Batch:
        """The first `rows` rows as the model's forward takes them; no number of it ever changes."""
        return Batch(
            input_ids=self._ids[None, :rows],
            position_ids=self._positions[None, :rows],
            slots=self._slots[:rows],
            cu_tokens=self._starts[: rows + 1],
            contexts=self._contexts[:rows],
            block_tables=self._tables[:rows],
            logit_index=self._index[:rows],
            rows=tuple(AttentionRow(i, 1, self._context) for i in range(rows)),
            sampling=tuple(range(rows)),
            scored=(),
            states=self._kept(self._starts[: rows + 1], self._came_from[:rows], self._to[:rows]),
        )

    def prompt(self, tokens: int) -> Batch:
        """A row of `tokens` tokens that stores nothing, over the null block."""
        tokens = min(tokens, self._context)
        zeros = torch.zeros(1, tokens, dtype=torch.int64, device=self._device)
        whole = torch.tensor([0, tokens], dtype=torch.int32, device=self._device)
        nobody = torch.full((1,), NOBODY, dtype=torch.int32, device=self._device)
        table = torch.zeros(1, self._columns, dtype=torch.int32, device=self._device)
        return Batch(
            input_ids=zeros,
            position_ids=torch.arange(tokens, device=self._device)[None],
            slots=torch.full((tokens,), -1, device=self._device),
            cu_tokens=whole,
            contexts=whole[1:].clone(),  # alone, as in a real step: kernels ask for alignment
            block_tables=table,
            logit_index=self._index[:1],
            rows=(AttentionRow(0, tokens, tokens),),
            sampling=(0,),
            scored=(),
            states=self._kept(whole, nobody, nobody),
        )

    def _kept(self, *rows: torch.Tensor) -> StateRows | None:
        return None if self._states is None else StateRows(*rows)
