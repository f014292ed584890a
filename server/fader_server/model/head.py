"""The output layer on the CPU: hidden states to fp32 logits at the speed of memory."""

import torch
from torch import nn

from fader_adapters.kernels.native import Tape, dense

ROWS = 16
"""Rows of one pass over the weight."""


class NativeHead(nn.Module):
    """Stands where the output embedding stood: x [..., hidden] → logits [..., vocab] in fp32.

    A row's logits do not depend on how many others there are. The weight is the model's own, so a
    tied embedding stays tied.
    """

    def __init__(self, head: nn.Linear, tape: Tape | None = None) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias
        self._tape = tape
        self._offset = None if head.bias is None else head.bias.data.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        logits = torch.empty(rows.shape[0], self.weight.shape[0], dtype=torch.float32)
        for start in range(0, rows.shape[0], ROWS):
            part = slice(start, start + ROWS)
            dense(
                rows[part], self.weight.data, bias=self._offset, out=logits[part], tape=self._tape
            )
        return logits.view(*x.shape[:-1], logits.shape[1])
