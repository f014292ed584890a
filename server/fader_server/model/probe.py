"""Logits of a text under other weights, on any thread: what a merge is measured with.

A copy of the base's modules that shares its weights and nothing else, so that the engine's steps
go on untouched. On one thread, with fp32 sums: in the kernels that serve where they can do that.
"""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from fader_adapters.kernels import native
from fader_adapters.kernels.cpu import NativeBackend
from fader_adapters.layers import SiteEmbedding, SiteHead, SiteLinear
from fader_adapters.pauses import Pause
from fader_adapters.spec import RowTerms, StepTerms
from fader_server.core import Plan, PlanRow, Request, SamplingParams
from fader_server.core import Sequence as Row
from fader_server.model.alone import SoloModel, attend_as_built
from fader_server.model.attention import StepAttention
from fader_server.model.batch import Batch
from fader_server.model.continuing import continue_scans
from fader_server.model.expert_views import show_mixtures
from fader_server.model.kernels import attention_alone
from fader_server.model.kv_cache import KVCache
from fader_server.model.loaded import LoadedBase
from fader_server.model.views import (
    CHUNK_WEIGHTS,
    Glass,
    ProbeEmbedding,
    ProbeHead,
    ProbeLinear,
    View,
)

Forward = Callable[[int, int], torch.Tensor]
"""(first position, positions) of one text → their logits; called from its beginning on."""

BLOCK_SIZE = 16
CHUNK_TOKENS = 32


def probe_bytes(base: LoadedBase, tokens: int, views: int) -> int:
    """What `logits` needs at most, an estimate from above."""
    blocks = -(-tokens // BLOCK_SIZE) + 1
    block = base.block_bytes(BLOCK_SIZE)
    work = 4 * (CHUNK_WEIGHTS * 2 + CHUNK_TOKENS * base.vocab_size * (views + 4))
    return views * blocks * block + work


class ProbeModel:
    """Forwards of one text on the caller's thread. Not for two threads at a time."""

    def __init__(self, base: LoadedBase, pause: Pause) -> None:
        self.pause = pause
        self._base = base
        self._glass = Glass(pause)
        memo: dict[int, object] = {id(p): p for p in base.model.parameters()}
        memo |= {id(b): b for b in base.model.buffers()}
        if isinstance(base.backend, NativeBackend):
            memo[id(base.backend.tape)] = native.Tape()  # nobody records what runs here
        for module in base.model.modules():
            if isinstance(module, SiteHead):
                memo[id(module)] = ProbeHead(module, self._glass)
            elif isinstance(module, SiteLinear):
                memo[id(module)] = ProbeLinear(module, self._glass)
            elif isinstance(module, SiteEmbedding):
                memo[id(module)] = self._embedding()
        self._model = copy.deepcopy(base.model, memo)
        for module in self._model.modules():
            module.__dict__.pop("forward", None)  # put there for the original's recordings
        show_mixtures(self._model, base.installed, self._glass)
        self._shapes = {
            found: shape for module, shape in base.layers.items()
            if isinstance(found := memo[id(module)], nn.Module)
        }  # fmt: skip
        self._solo: SoloModel | None = None
        if base.keeps_states:
            attend_as_built(self._model)
            continue_scans(self._model)
            self._solo = SoloModel(self._model)

    @property
    def device(self) -> torch.device:
        return self._base.device

    def _embedding(self) -> ProbeEmbedding:
        installed = self._base.installed
        assert installed.table is not None
        roles = [linear.role for linear in installed.spec.linears]
        return ProbeEmbedding(installed.table, roles.index("embedding"), self._glass)

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
