"""Logits of a text under other weights, on any thread: what a merge is measured with.

A copy of the base's modules that shares its weights and nothing else, so that the engine's steps
go on untouched. On one thread, with fp32 sums: in the kernels that serve where they can do that.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from fader_adapters.changes import Change, Changes
from fader_adapters.kernels import native
from fader_adapters.kernels.backend import BaseLinear
from fader_adapters.kernels.cpu import NativeBackend
from fader_adapters.kernels.dense import ByToken, EmbeddingTable
from fader_adapters.kernels.native.panels import PANEL
from fader_adapters.lane import MergedLane
from fader_adapters.layers import Site, SiteEmbedding, SiteHead, SiteLinear
from fader_adapters.pauses import Pause
from fader_adapters.spec import RowTerms, StepTerms
from fader_server.core import Plan, PlanRow, Request, SamplingParams
from fader_server.core import Sequence as Row
from fader_server.model.attention import StepAttention
from fader_server.model.batch import Batch
from fader_server.model.kernels import attention_alone
from fader_server.model.kv_cache import KVCache
from fader_server.model.loaded import LoadedBase
from fader_server.model.solo import SoloModel

Forward = Callable[[int, int], torch.Tensor]
"""(first position, positions) of one text → their logits; called from its beginning on."""

BLOCK_SIZE = 16
CHUNK_TOKENS = 32
CHUNK_WEIGHTS = 1 << 19
"""Weights multiplied at a time: a fifth of a millisecond."""


def probe_bytes(base: LoadedBase, tokens: int, views: int) -> int:
    """What `logits` needs at most, an estimate from above."""
    blocks = -(-tokens // BLOCK_SIZE) + 1
    block = base.block_bytes(BLOCK_SIZE)
    work = 4 * (CHUNK_WEIGHTS * 2 + CHUNK_TOKENS * base.vocab_size * (views + 4))
    return views * blocks * block + work


class View(Protocol):
    """Weights to look through."""

    def weight(self, site: Site) -> BaseLinear: ...

    @property
    def table(self) -> torch.Tensor | None:
        """[tokens, width] what the embedding gives, if not what the base's does."""
        ...

    def change(self, linear: int) -> Change | None:
        """What happens to a linear beside its weight."""
        ...


class BaseView:
    """The base itself."""

    def weight(self, site: Site) -> BaseLinear:
        return site.kernel.base

    @property
    def table(self) -> torch.Tensor | None:
        return None

    def change(self, linear: int) -> Change | None:
        return None


class BlendView(BaseView):
    """The base with a blend beside it, as the delta lane computes it."""

    def __init__(self, changes: Changes, device: torch.device) -> None:
        self._changes = changes
        self._device = device

    def change(self, linear: int) -> Change | None:
        change = self._changes.of(linear)
        return None if change is None else change.to(self._device)


class LaneView(BaseView):
    """A merged lane."""

    def __init__(self, lane: MergedLane) -> None:
        self._weights = lane.weights

    def weight(self, site: Site) -> BaseLinear:
        return self._weights.bases.get(site, site.kernel.base)

    @property
    def table(self) -> torch.Tensor | None:
        return self._weights.table


class _Glass:
    """Where the copy's linears find the view of the forward that runs now."""

    def __init__(self, pause: Pause) -> None:
        self.view: View = BaseView()
        self.pause = pause


class _ProbeLinear(nn.Module):
    def __init__(self, original: SiteLinear, glass: _Glass) -> None:
        super().__init__()
        self.in_features, self.out_features = original.in_features, original.out_features
        self._site, self._glass = original.site, glass
        spec = self._site.spec
        self._linear = spec.linears[original.member]
        self._start = sum(spec.out_features[: original.member])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        view = self._glass.view
        self._glass.pause()  # after what the model did before
        weight = view.weight(self._site)
        rows = x.reshape(-1, self.in_features)
        stop = self._start + self.out_features
        y = _product(rows, weight, self._start, stop, self._glass.pause)
        change = view.change(self._linear)
        if change is not None:
            y = _changed(y, rows.float(), change)
        if weight.bias is not None:
            y += weight.bias[self._start : stop].float()
        return self._given(y, x).view(*x.shape[:-1], self.out_features)

    def _given(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y.to(x.dtype)


class _ProbeHead(_ProbeLinear):
    """The output head: fp32 logits."""

    def _given(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y


class _ProbeEmbedding(nn.Module):
    def __init__(self, table: EmbeddingTable, linear: int, glass: _Glass) -> None:
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


def _product(
    x: torch.Tensor, weight: BaseLinear, start: int, stop: int, pause: Pause
) -> torch.Tensor:
    """x [T, in] times rows start..stop of a weight, a few at a time, in fp32."""
    y = x.new_empty(x.shape[0], stop - start, dtype=torch.float32)
    step = max(1, CHUNK_WEIGHTS // x.shape[1] // PANEL) * PANEL
    for at in range(start, stop, step):
        end = min(at + step, stop)
        y[:, at - start : end - start] = weight.product(x, at, end)
        pause()
    return y


def _changed(y: torch.Tensor, x: torch.Tensor, change: Change) -> torch.Tensor:
    """y = W·x [T, out] with the blend beside it."""
    if change.gain is not None:
        y = y * (1 + change.gain)
    y = y + F.linear(F.linear(x, change.delta.a), change.delta.b)
    return y if change.bias is None else y + change.bias


class ProbeModel:
    """Forwards of one text on the caller's thread. Not for two threads at a time."""

    def __init__(self, base: LoadedBase, pause: Pause) -> None:
        self.pause = pause
        self._base = base
        self._glass = _Glass(pause)
        memo: dict[int, object] = {id(p): p for p in base.model.parameters()}
        memo |= {id(b): b for b in base.model.buffers()}
        if isinstance(base.backend, NativeBackend):
            memo[id(base.backend.tape)] = native.Tape()  # nobody records what runs here
        for module in base.model.modules():
            if isinstance(module, SiteHead):
                memo[id(module)] = _ProbeHead(module, self._glass)
            elif isinstance(module, SiteLinear):
                memo[id(module)] = _ProbeLinear(module, self._glass)
            elif isinstance(module, SiteEmbedding):
                memo[id(module)] = self._embedding()
        self._model = copy.deepcopy(base.model, memo)
        for module in self._model.modules():
            module.__dict__.pop("forward", None)  # put there for the original's recordings
        self._shapes = {
            found: shape for module, shape in base.layers.items()
            if isinstance(found := memo[id(module)], nn.Module)
        }  # fmt: skip
        self._solo = None if base.solo is None else SoloModel(self._model)

    @property
    def device(self) -> torch.device:
        return self._base.device

    def _embedding(self) -> _ProbeEmbedding:
        installed = self._base.installed
        assert installed.table is not None
        roles = [linear.role for linear in installed.spec.linears]
        return _ProbeEmbedding(installed.table, roles.index("embedding"), self._glass)

    def logits(self, tokens: Sequence[int], views: Sequence[View]) -> Iterator[list[torch.Tensor]]:
        """For every chunk of positions [n, vocab] under each view, in the text's order."""
        begin = self._packed if self._solo is None else self._alone(self._solo)
        forwards = [begin(tokens) for _ in views]
        for start in range(0, len(tokens), CHUNK_TOKENS):
            count = min(CHUNK_TOKENS, len(tokens) - start)
            yield [
                self._through(view, forward, start, count)
                for view, forward in zip(views, forwards, strict=True)
            ]

    def _through(self, view: View, forward: Forward, start: int, count: int) -> torch.Tensor:
        self._glass.view = view
        with native.alone(), torch.inference_mode():
            return forward(start, count).float()

    def _alone(self, solo: SoloModel) -> Callable[[Sequence[int]], Forward]:
        def begin(tokens: Sequence[int]) -> Forward:
            cache = solo.new_cache()
            return lambda start, count: solo.logits(
                list(tokens[start : start + count]), start, cache, list(range(count))
            )

        return begin

    def _cache(self, tokens: int) -> KVCache:
        base = self._base
        return KVCache(
            self._shapes,
            blocks=-(-tokens // BLOCK_SIZE) + 1,
            block_size=BLOCK_SIZE,
            dtype=base.dtype,
            device=base.device,
        )

    def _packed(self, tokens: Sequence[int]) -> Forward:
        cache, device = self._cache(len(tokens)), self._base.device
        attention = attention_alone(self._base, block_size=BLOCK_SIZE)
        params = SamplingParams(prompt_logprobs=0)
        row = Row(Request("probe", tuple(tokens), params), [*tokens, 0])
        row.blocks = list(range(1, cache.blocks))

        def forward(start: int, count: int) -> torch.Tensor:
            plan = Plan((PlanRow(row, start, count, False),), StepTerms((RowTerms(count),)))
            batch = Batch.from_plan(plan, block_size=BLOCK_SIZE, device=device)
            return self._model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=torch.arange(count, device=device),
                fader_step=StepAttention(attention, cache, batch),
            ).logits[0]

        return forward
