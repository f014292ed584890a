"""What a probe's forwards compute with instead of the base's linears: other weights, in fp32.

Knows sites and weights; knows no text and no cache.
"""

from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from fader_adapters.changes import Change, Changes
from fader_adapters.expert_layers import Stack
from fader_adapters.kernels.backend import BaseLinear, ExpertsWeight
from fader_adapters.kernels.dense import ByToken, EmbeddingTable
from fader_adapters.kernels.native.panels import PANEL
from fader_adapters.lane import MergedLane
from fader_adapters.layers import Site, SiteLinear, in_rows
from fader_adapters.pauses import Pause

CHUNK_WEIGHTS = 1 << 19
"""Weights multiplied at a time: a fifth of a millisecond."""


class View(Protocol):
    """Weights to look through."""

    def weight(self, site: Site) -> BaseLinear: ...

    @property
    def table(self) -> torch.Tensor | None:
        """[tokens, width] what the embedding gives, if not what the base's does."""
        ...

    def stack(self, stack: Stack) -> ExpertsWeight: ...

    def change(self, linear: int, expert: int = 0) -> Change | None:
        """What happens to a linear, or an expert of a stack, beside its weight."""
        ...


class BaseView:
    """The base itself."""

    def weight(self, site: Site) -> BaseLinear:
        return site.kernel.base

    @property
    def table(self) -> torch.Tensor | None:
        return None

    def stack(self, stack: Stack) -> ExpertsWeight:
        return stack.weight

    def change(self, linear: int, expert: int = 0) -> Change | None:
        return None


class BlendView(BaseView):
    """The base with a blend beside it, as the delta lane computes it."""

    def __init__(self, changes: Changes, device: torch.device) -> None:
        self._changes = changes
        self._device = device

    def change(self, linear: int, expert: int = 0) -> Change | None:
        change = self._changes.of(linear, expert)
        return None if change is None else change.to(self._device)


class LaneView(BaseView):
    """A merged lane."""

    def __init__(self, lane: MergedLane) -> None:
        self._weights = lane.weights

    def weight(self, site: Site) -> BaseLinear:
        return self._weights.bases.get(site, site.kernel.base)

    def stack(self, stack: Stack) -> ExpertsWeight:
        return self._weights.stacks.get(stack.index, stack.weight)

    @property
    def table(self) -> torch.Tensor | None:
        return self._weights.table


class Glass:
    """Where the copy's linears find the view of the forward that runs now."""

    def __init__(self, pause: Pause) -> None:
        self.view: View = BaseView()
        self.pause = pause


class ProbeLinear(nn.Module):
    def __init__(self, original: SiteLinear, glass: Glass) -> None:
        super().__init__()
        self.in_features, self.out_features = original.in_features, original.out_features
        self.weight, self.bias = original.weight, original.bias  # for models that ask for them
        self._site, self._glass = original.site, glass
        spec = self._site.spec
        self._linear = spec.linears[original.member]
        self._start = sum(spec.out_features[: original.member])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        view = self._glass.view
        self._glass.pause()  # after what the model did before
        weight = view.weight(self._site)
        rows = in_rows(x, self.in_features)
        stop = self._start + self.out_features
        y = product(rows, weight, self._start, stop, self._glass.pause)
        change = view.change(self._linear)
        if change is not None:
            y = changed(y, rows.float(), change)
        if weight.bias is not None:
            y += weight.bias[self._start : stop].float()
        return self._given(y, x).view(*x.shape[:-1], self.out_features)

    def _given(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y.to(x.dtype)


class ProbeHead(ProbeLinear):
    """The output head: fp32 logits."""

    def _given(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y


class ProbeEmbedding(nn.Module):
    def __init__(self, table: EmbeddingTable, linear: int, glass: Glass) -> None:
        super().__init__()
        self._base, self._linear, self._glass = table, linear, glass

    @property
    def weight(self) -> torch.Tensor | ByToken:
        return self._base.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        view = self._glass.view
        if view.table is not None:
            return F.embedding(ids, view.table)
        y = self._base.lookup(ids)
        change = view.change(self._linear)
        if change is None:
            return y
        rows = y.reshape(-1, y.shape[-1]).float()
        return change.of_lookup(rows, ids.reshape(-1)).to(y.dtype).view_as(y)


def product(
    x: torch.Tensor, weight: BaseLinear | ExpertsWeight, start: int, stop: int, pause: Pause
) -> torch.Tensor:
    """x [T, in] times rows start..stop of a weight, a few at a time, in fp32."""
    y = x.new_empty(x.shape[0], stop - start, dtype=torch.float32)
    step = max(1, CHUNK_WEIGHTS // x.shape[1] // PANEL) * PANEL
    for at in range(start, stop, step):
        end = min(at + step, stop)
        y[:, at - start : end - start] = weight.product(x, at, end)
        pause()
    return y


def changed(y: torch.Tensor, x: torch.Tensor, change: Change) -> torch.Tensor:
    """y = W·x [T, out] with the blend beside it."""
    if change.gain is not None:
        y = y * (1 + change.gain)
    y = y + F.linear(F.linear(x, change.delta.a), change.delta.b)
    return y if change.bias is None else y + change.bias
