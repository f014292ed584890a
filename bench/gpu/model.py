"""A whole model of random NF4 weights made on the device, and steps of its real runner."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
import transformers
from transformers import AutoModelForCausalLM

from bench.gpu.section import Rig
from bench.gpu.shapes import Shape
from bench.gpu.weights import adapter_spec, fill, nf4_weight
from fader_adapters.describe import describe
from fader_adapters.kernels.cuda.backend import CudaBackend
from fader_adapters.kernels.dense import DenseLinear
from fader_adapters.kernels.tables import Tables
from fader_adapters.layers import Installed, Site, SiteHead, SiteLinear
from fader_adapters.packed_weight import PackedWeight
from fader_adapters.spec import RowTerms, SiteSpec, StepTerms
from fader_adapters.step_state import StepState
from fader_server.core import Plan, PlanRow, Request, SamplingParams
from fader_server.core import Sequence as Stream
from fader_server.model import attention, graphs
from fader_server.model.cuda_attention import CudaAttention
from fader_server.model.cuda_modules import use_cuda
from fader_server.model.kernels import choose_distributions
from fader_server.model.kv_cache import KVCache, LayerShape
from fader_server.model.launching import LaunchingRunner
from fader_server.model.loaded import LoadedBase
from fader_server.model.sampler import Sampler

PAGE = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=1 << 30)
Terms = tuple[tuple[int, float], ...]


class Machine:
    """Model, cache, arena and runner; adapters are written straight into the arena."""

    def __init__(
        self, rig: Rig, shape: Shape, *, rows: int, context: int, arena: int, prompts: int = 0
    ) -> None:
        """prompts: tokens of captured steps of prompts, 0 for none."""
        self.rig, self.shape, self.rows, self.context = rig, shape, rows, context
        self.base = random_base(rig, shape)
        self.spec = self.base.installed.spec
        weights = torch.full((arena,), torch.nan, dtype=rig.dtype, device=rig.device)
        self.tables = Tables(weights, len(self.spec.linears))
        self._per_row = -(-context // PAGE)
        self.cache = KVCache(
            self.base.layers,
            blocks=rows * self._per_row + 1,
            block_size=PAGE,
            dtype=rig.dtype,
            device=rig.device,
        )
        for layer in self.cache.layers():
            fill(layer.k[1:], 1.0)
            fill(layer.v[1:], 1.0)
        self.attention = CudaAttention(
            max_rows=rows, max_context=context, max_tokens=prompts, device=rig.device
        )
        told = _Told()
        graphs.log.addHandler(told)
        graphs.log.setLevel(logging.INFO)
        self.runner = LaunchingRunner(
            self.base,
            cache=self.cache,
            tables=self.tables,
            attention=self.attention,
            sampler=Sampler(choose_distributions(self.base)),
        )
        if not rig.on_gpu:  # a graph that runs its work again
            self.runner._replays = graphs.capture(
                self.base, cache=self.cache, attention=self.attention, tables=self.tables,
                run=self.runner._rows, record=lambda run: run,
            )  # fmt: skip
        graphs.log.removeHandler(told)
        self.told = told.text
        """What the capture said: how many graphs in what time and memory, or why there are none."""
        self._offset = 0

    @property
    def graphs(self) -> graphs.DecodeGraphs | None:
        found = self.runner._replays
        return found if isinstance(found, graphs.DecodeGraphs) else None

    def add_adapters(self, count: int, rank: int) -> list[int]:
        """Slots of new random adapters of this rank at every linear."""
        slots = []
        for _ in range(count):
            slot = int((self.tables.rank.amax(dim=1) > 0).sum()) if self.tables.slots else 0
            spec = adapter_spec(self.spec, slot, rank)
            fill(self.tables.arena[self._offset : self._offset + spec.numel])
            self.tables.publish(slot, spec, self._offset)
            self._offset += spec.numel
            slots.append(slot)
        return slots

    def drop_adapters(self) -> None:
        for slot in range(self.tables.slots):
            self.tables.retract(slot)
        self._offset = 0

    def streams(self, terms: Sequence[Terms], at: int) -> list[Stream]:
        """One sequence a row, its tokens up to `at` in the cache."""
        found = []
        for row, own in enumerate(terms):
            tokens = [(7 * row + 3 * i) % self.shape.vocab for i in range(at + 1)]
            blocks = list(range(row * self._per_row + 1, (row + 1) * self._per_row + 1))
            request = Request(f"r{row}", tuple(tokens), GREEDY)
            found.append(Stream(request, tokens, at, blocks, terms=(RowTerms(1, own),)))
        return found

    def prompt(self, row: int, tokens: int, own: Terms = ()) -> Plan:
        """A row's first `tokens` tokens in one step."""
        (stream,) = self.streams([own], tokens - 1)
        stream.blocks = list(range(row * self._per_row + 1, (row + 1) * self._per_row + 1))
        return Plan((PlanRow(stream, 0, tokens, True),), StepTerms((RowTerms(tokens, own),)))


class _Told(logging.Handler):
    """Keeps what is logged, as text."""

    text = "nothing was captured"

    def emit(self, record: logging.LogRecord) -> None:
        self.text = f"{record.getMessage()} {getattr(record, 'fields', '')}".strip()


def decode_plan(streams: Sequence[Stream]) -> Plan:
    """Every stream's newest token."""
    rows = tuple(PlanRow(s, len(s.tokens) - 1, 1, True) for s in streams)
    return Plan(rows, StepTerms(tuple(s.terms[-1] for s in streams)))


def advance(streams: Sequence[Stream], tokens: Sequence[int | None]) -> None:
    for stream, token in zip(streams, tokens, strict=True):
        assert token is not None
        stream.tokens.append(token)


def random_base(rig: Rig, shape: Shape) -> LoadedBase:
    """transformers' Llama on the device, its linears Fader's sites over random NF4 weights."""
    attention.register()
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inter,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.dim,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    with torch.device(rig.device):
        build: Any = AutoModelForCausalLM.from_config
        model = build(config, attn_implementation=attention.NAME, dtype=rig.dtype).eval()
    model.requires_grad_(False)
    backend = CudaBackend(rig.device, rig.dtype, entries=16 if rig.small else 1024)
    spec = describe(model)
    kept = tuple(linear for linear in spec.linears if linear.role != "embedding")
    spec = dataclasses.replace(spec, linears=kept)
    state = StepState()
    sites: list[Site] = []
    place = {linear.path: i for i, linear in enumerate(spec.linears)}
    for layer in range(shape.layers):
        own = f"model.layers.{layer}"
        for parent, names in (
            ("self_attn", ("q_proj", "k_proj", "v_proj")),
            ("self_attn", ("o_proj",)),
            ("mlp", ("gate_proj", "up_proj")),
            ("mlp", ("down_proj",)),
        ):
            module = model.get_submodule(f"{own}.{parent}")
            members = [place[f"{own}.{parent}.{name}"] for name in names]
            linears = [spec.linears[i] for i in members]
            outs = tuple(linear.out_features for linear in linears)
            site_spec = SiteSpec(tuple(members), linears[0].in_features, outs)
            base = backend.linear([nf4_weight(sum(outs), site_spec.in_features, rig)], None)
            site = Site(site_spec, backend.bind(site_spec, base), state)
            sites.append(site)
            for i, name in enumerate(names):
                weight = PackedWeight(rig.dtype, rig.device)
                setattr(module, name, SiteLinear(site, i, weight))
    layers = {
        model.get_submodule(f"model.layers.{i}.self_attn"): LayerShape(
            shape.kv_heads, shape.dim, shape.dim
        )
        for i in range(shape.layers)
    }
    head = None
    for index, linear in enumerate(spec.linears):
        if linear.role == "head":
            head_spec = SiteSpec((index,), linear.in_features, (linear.out_features,))
            dense = DenseLinear(model.lm_head.weight.data, None)
            head = Site(head_spec, backend.bind(head_spec, dense), state, head=True)
            model.lm_head = SiteHead(head, cast(torch.nn.Linear, model.lm_head))
    use_cuda(cast(Any, model))
    if rig.on_gpu:
        torch.cuda.empty_cache()
    return LoadedBase(
        model=cast(Any, model),
        installed=Installed(spec, tuple(sites), state, head),
        layers=layers,
        source="random",
        dtype=rig.dtype,
        device=rig.device,
        backend=backend,
        max_positions=8192,
        vocab_size=shape.vocab,
    )
