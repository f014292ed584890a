"""The two ends of a model on the CPU, hidden states to logits and token ids to hidden states, over
one packed weight where the model ties them. Knows no adapters."""

import torch
from torch import nn
from transformers import PreTrainedModel

from fader_adapters.kernels.cpu import NativeBackend, PanelLinear
from fader_adapters.kernels.native import PlainPanels, Tape
from fader_adapters.kernels.native.panels import BLOCK

PROBES = 257
"""Rows of an embedding that are compared before a stand-in is trusted."""


class NativeHead(nn.Module):
    """Stands where the output embedding stood: x [..., hidden] → logits [..., vocab] in fp32.

    A row's logits do not depend on how many others there are.
    """

    def __init__(self, linear: PanelLinear, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.linear = linear
        self.bias = bias
        self.weight = nn.Parameter(linear.panels.panels, requires_grad=False)
        """The panels: what the model keeps in memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        logits = torch.empty(rows.shape[0], self.linear.out_features, dtype=torch.float32)
        self.linear.site(rows, out=logits)
        return logits.view(*x.shape[:-1], logits.shape[1])


class NativeEmbedding(nn.Module):
    """Stands where the input embedding stood: ids → rows of panels [..., hidden], scaled."""

    def __init__(self, panels: PlainPanels, scale: torch.Tensor | None, tape: Tape) -> None:
        super().__init__()
        self._panels = panels
        self._tape = tape
        self.scale = scale
        """One element; None: the rows as they are."""

    def copied(self, tape: Tape) -> "NativeEmbedding":
        """The same over the same panels, told to another tape."""
        return NativeEmbedding(self._panels, self.scale, tape)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        rows = self._panels.take(input_ids.contiguous(), tape=self._tape)
        return rows if self.scale is None else rows * self.scale


def replace_ends(model: PreTrainedModel, backend: NativeBackend, *, dtype: torch.dtype) -> None:
    """Put native modules where they give what the model's own give.

    A tied weight stays one: the embedding then reads the head's panels. One that does more than
    look rows up and scale them keeps the model's own copy.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or head.in_features % BLOCK or head.weight.dtype != dtype:
        return
    linear = backend.plain(head.weight.data, None if head.bias is None else head.bias.data)
    if isinstance(embedding, nn.Embedding) and embedding.weight is head.weight:
        assert isinstance(linear.panels, PlainPanels)
        stand_in = _embedding(embedding, linear.panels, backend.tape)
        if stand_in is not None:
            model.set_input_embeddings(stand_in)
    model.set_output_embeddings(NativeHead(linear, head.bias))


def _embedding(embedding: nn.Embedding, panels: PlainPanels, tape: Tape) -> NativeEmbedding | None:
    """None when the module computes something else; its own output decides, not its name."""
    ids = torch.linspace(0, panels.n - 1, PROBES).long()
    with torch.inference_mode():
        own, rows = embedding(ids), embedding.weight.data[ids]
        if own.dtype != rows.dtype:
            return None
        ratio = (own.double() / rows.double())[rows != 0].median()
        for scale in (None, ratio.to(rows.dtype)):
            if torch.equal(own, NativeEmbedding(panels, scale, tape)(ids)):
                return NativeEmbedding(panels, scale, tape)
    return None
