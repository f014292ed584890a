"""The integers of one attention step on the device, and buffers that hold them at fixed addresses.
Knows capacities; no kernels, no models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """One step's rows on the device, the same for all layers. Grids come from capacities.

    cu_tokens     [R + 1] int32, where each row's tokens begin
    contexts      [R] int32, keys of a row, its new tokens included; 0: a padding row, which is
                  answered with zeros
    block_tables  [R, W] int32, rows contiguous; entries past a row's context are never looked at
    """

    cu_tokens: Tensor
    contexts: Tensor
    block_tables: Tensor
    tokens: int
    """Packed tokens at most."""
    context: int
    """Keys of a row of one token at most."""
    decodes: bool
    """Whether a row may have one token."""
    prefills: bool
    """Whether a row may have more."""

    @property
    def rows(self) -> int:
        return self.contexts.shape[0]


class StepBuffers:
    """An AttentionStep and the cache slots at fixed addresses, for a captured graph.

    rows, tokens: capacities, tokens at least rows; tokens == rows is a step of decode rows alone.
    columns: blocks a row at most. block_size: tokens a block.
    `step` and `slots` never move. Tokens left over belong to padding rows: their slots are −1, so
    nothing is stored, and their attention is zeros.
    """

    step: AttentionStep
    slots: Tensor
    """[tokens] int64"""

    def __init__(
        self, *, rows: int, tokens: int, columns: int, block_size: int, device: torch.device
    ) -> None:
        """Allocates, on the host too (pinned, for a CUDA device). Raises: ValueError."""
        if not 1 <= rows <= tokens or columns < 1:
            raise ValueError(
                f"expected 1 <= rows <= tokens and a column, got {rows}, {tokens} and {columns}"
            )
        self._rows = rows
        mixed = tokens > rows
        total = rows + mixed  # the extra row takes the tokens that no other padding row takes
        self._tokens, self._total = tokens, total
        sizes = (total + 1, total, 2 * tokens, total * columns)
        ends = [0]
        for size in sizes:
            ends.append(ends[-1] + -(-size // 4) * 4)  # 16-byte alignment, which Triton asks about
        self._host = torch.zeros(ends[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(ends[-1], dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        starts, contexts, slots, tables = (
            slice(at, at + size) for at, size in zip(ends, sizes, strict=False)
        )
        host = self._host
        self._starts, self._contexts = host[starts].numpy(), host[contexts].numpy()
        self._slots = host[slots].view(torch.int64).numpy()
        self._tables = host[tables].view(total, columns).numpy()
        self.slots = self._device[slots].view(torch.int64)
        self.step = AttentionStep(
            cu_tokens=self._device[starts],
            contexts=self._device[contexts],
            block_tables=self._device[tables].view(total, columns),
            tokens=tokens,
            context=columns * block_size,
            decodes=True,
            prefills=mixed,
        )
        self.fill([0], [], [], [])

    def fill(
        self,
        starts: Sequence[int],
        contexts: Sequence[int],
        tables: Sequence[Sequence[int]],
        slots: Sequence[int],
    ) -> None:
        """Send one step's integers in one asynchronous copy on the current stream.

        starts: where each of the n rows' tokens begin, then their number; contexts: keys of each
        row; tables: the blocks of each row; slots: the place of each token.
        Raises: ValueError for what does not fit, before anything is sent.
        """
        count, used = len(contexts), starts[-1]
        self._check(starts, contexts, tables, slots)
        if self._copied is not None:
            self._copied.synchronize()  # the last copy still reads the host buffer
        self._starts[: count + 1] = starts
        padding = range(used, used + self._total - count)
        self._starts[count : self._total] = [min(token, self._tokens) for token in padding]
        self._starts[self._total] = self._tokens
        self._contexts[:count] = contexts
        self._contexts[count:] = 0
        self._slots[:used] = slots
        self._slots[used:] = -1
        for row, blocks in zip(self._tables, tables, strict=False):
            row[: len(blocks)] = blocks
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _check(
        self,
        starts: Sequence[int],
        contexts: Sequence[int],
        tables: Sequence[Sequence[int]],
        slots: Sequence[int],
    ) -> None:
        count, used = len(contexts), starts[-1]
        if not len(starts) - 1 == count == len(tables) or used != len(slots):
            raise ValueError(
                f"expected {len(starts) - 1} rows of {used} tokens, got {count} contexts, "
                f"{len(tables)} tables and {len(slots)} slots"
            )
        widest = max(map(len, tables), default=0)
        if count > self._rows or used > self._tokens or widest > self._tables.shape[1]:
            raise ValueError(
                f"expected at most {self._rows} rows, {self._tokens} tokens and "
                f"{self._tables.shape[1]} blocks a row, got {count}, {used} and {widest}"
            )
        if not self.step.prefills and used != count:
            raise ValueError(f"expected rows of one token, got {used} tokens in {count} rows")
