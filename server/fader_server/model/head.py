"""The two ends of a model on the CPU over one packed weight, where the model ties them. Knows no
adapters."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from fader_adapters.kernels.cpu import NativeBackend, NativeHead
from fader_adapters.kernels.dense import ByToken
from fader_adapters.kernels.native import PlainPanels, Screen, Tape
from fader_adapters.kernels.native.panels import BLOCK
from fader_adapters.layers import Installed, SiteEmbedding, SiteHead

SCREENED = 1 << 22
"""Weights of an output layer from which on reading codes instead is worth their memory."""
PROBES = 257
"""Rows of an embedding that are compared before a stand-in is trusted."""


class NativeEmbedding(nn.Module):
    """Stands where the input embedding stood: ids → rows of panels [..., hidden], scaled."""

    def __init__(self, panels: PlainPanels, scale: torch.Tensor | None, tape: Tape | None) -> None:
        super().__init__()
        self._panels = panels
        self._tape = tape
        self.scale = scale
        """One element; None: the rows as they are."""

    def copied(self, tape: Tape | None) -> "NativeEmbedding":
        """The same over the same panels, told to another tape or to none."""
        return NativeEmbedding(self._panels, self.scale, tape)

    @property
    def weight(self) -> ByToken:
        """For a model that reads rows of its table by itself."""
        return ByToken(self._panels)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        rows = self._panels.take(input_ids.contiguous(), tape=self._tape)
        return rows if self.scale is None else rows * self.scale


def replace_ends(
    model: PreTrainedModel, installed: Installed, backend: NativeBackend, *, dtype: torch.dtype
) -> None:
    """Pack the output layer's weight, where the model has a plain one of `dtype`.

    A tied weight stays one: the embedding then reads the head's panels. An embedding that does more
    than look rows up and scale them keeps the model's own copy.
    """
    head, site = model.get_output_embeddings(), installed.head
    if site is None or not isinstance(head, SiteHead):
        return
    weight, bias = head.weight, head.bias
    if weight.dtype != dtype or weight.shape[1] % BLOCK:
        return
    kernel = backend.bind_head(site.spec, weight.data, None if bias is None else bias.data)
    panels = kernel.panels
    assert isinstance(panels, PlainPanels)
    ours = model.get_input_embeddings()
    if isinstance(ours, SiteEmbedding) and ours.inner.weight is weight:
        stand_in = _embedding(ours.inner, panels, backend.tape)
        if stand_in is not None:
            ours.inner = stand_in
            assert installed.table is not None
            installed.table.source = panels
            installed.table.lookup = stand_in.copied(None)
    site.kernel = kernel
    head.weight = nn.Parameter(panels.panels, requires_grad=False)


def screen_of(
    model: PreTrainedModel, installed: Installed, forward: Callable[[], torch.Tensor]
) -> Screen | None:
    """A screen for a large native output layer, where `forward`'s logits are its outputs as they
    are: what is done to logits may make equal what was not."""
    site = installed.head
    if site is None or not isinstance(site.kernel, NativeHead):
        return None
    if site.kernel.panels.n * site.kernel.panels.k < SCREENED:
        return None
    outputs: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    handle = head.register_forward_hook(lambda *given: outputs.append(given[-1]))
    try:
        logits = forward()
    except Exception:  # noqa: BLE001 - whatever it is, the rehearsal says it better
        return None
    finally:
        handle.remove()
    same = len(outputs) == 1 and outputs[0].shape == logits.shape
    return site.kernel.screened() if same and torch.equal(outputs[0], logits) else None


def _embedding(embedding: nn.Module, panels: PlainPanels, tape: Tape) -> NativeEmbedding | None:
    """None when the module computes something else; its own output decides, not its name."""
    ids = torch.linspace(0, panels.n - 1, PROBES).long()
    with torch.inference_mode():
        own, rows = embedding(ids), panels.take(ids)
        if own.dtype != rows.dtype:
            return None
        ratio = (own.double() / rows.double())[rows != 0].median()
        for scale in (None, ratio.to(rows.dtype)):
            if torch.equal(own, NativeEmbedding(panels, scale, tape)(ids)):
                return NativeEmbedding(panels, scale, tape)
    return None
