"""A whole engine over a tiny model, driven step by step on the test's own thread."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fader_adapters.kernels.backend import BackendName, choose
from fader_adapters.kernels.tables import Tables
from fader_adapters.leases import AdapterRef
from fader_adapters.parse import read_adapter
from fader_adapters.pool import Pool
from fader_adapters.source import LocalSources
from fader_adapters.store import Store
from fader_server.assembly import blocks_of, host_tier
from fader_server.core import Guide, Plan, Request, SamplingParams, TokenEvent, TokenLogprob
from fader_server.engine.limits import Limits
from fader_server.engine.scheduler import Scheduler
from fader_server.model.kernels import choose_attention, choose_distributions
from fader_server.model.kv_cache import KVCache
from fader_server.model.loader import load_base
from fader_server.model.runner import ModelRunner
from fader_server.model.sampler import Sampler

CPU = torch.device("cpu")


@dataclass
class Answer:
    """What one request got."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    cached: int = 0
    finish: str | None = None
    error: Exception | None = None


class TinyWorld:
    """Base, adapters, scheduler and runner; `run` serves a set of requests to their ends."""

    def __init__(
        self,
        source: Path,
        *,
        dtype: torch.dtype = torch.float32,
        backend: BackendName = "auto",
        limits: Limits | None = None,
        blocks: int = 256,
        poison: bool = True,
        device: torch.device = CPU,
        arena: int = 1 << 22,
        quantize_experts: bool = False,
    ) -> None:
        """arena: its elements."""
        self.base = load_base(
            str(source),
            dtype=dtype,
            device=device,
            backend=choose(device, dtype, backend),
            quantize_experts=quantize_experts,
        )
        weights = torch.full((arena,), float("nan"), dtype=dtype, device=device)
        self.tables = Tables(weights, len(self.base.installed.spec.linears))
        self.pool = Pool(self.tables, in_place=device.type == "cpu")
        self.store = Store(host_tier(weights, None), on_retired=self._retired)
        self.blocks = blocks_of(self.base, blocks)
        self.cache = KVCache(
            self.base.layers, blocks=blocks, block_size=16, dtype=dtype, device=device
        )
        if poison:  # whatever is read before it was written shows
            for layer in self.cache.layers():
                layer.k[1:].fill_(float("nan"))
                layer.v[1:].fill_(float("nan"))
        limits = limits or Limits(max_rows=32, max_step_tokens=288, max_model_len=512)
        states = self.base.packed_states
        limits = replace(limits, solo=self.base.solo is not None, block=16 if states else 0)
        if states is not None:
            states.reserve(limits.max_rows)
        self.runner = self._runner(limits)
        self.scheduler = Scheduler(
            limits,
            blocks=self.blocks,
            pool=self.pool,
        )
        self.plans: list[Plan] = []
        self._next = 0

    def _runner(self, limits: Limits) -> ModelRunner:
        return ModelRunner(
            self.base,
            cache=self.cache,
            tables=self.tables,
            attention=choose_attention(self.base, block_size=16),
            sampler=Sampler(choose_distributions(self.base)),
        )

    def load(self, name: str, path: Path) -> None:
        raw = LocalSources(()).fetch_trusted(path)
        installed = self.base.installed
        parsed = read_adapter(raw, installed.spec, dtype=self.base.dtype, weights=installed)
        reservation = self.store.reserve(parsed)
        reservation.fill()
        self.store.publish(name, reservation, replace=True)

    def run(self, asks: list["Ask"]) -> list[Answer]:
        """Serve all of them together, leases and all; asserts that nothing is left behind."""
        answers: dict[str, Answer] = {}
        leases = []
        for ask in asks:
            refs = [AdapterRef(name, None, gamma) for name, gamma in ask.blend.items()]
            lease = self.store.acquire(refs)
            leases.append(lease)
            request = Request(
                f"r{self._next}",
                tuple(ask.prompt),
                ask.params,
                lease.blend,
                lease.adapters,
                guide=ask.guide,
                prediction=tuple(ask.prediction),
            )
            self._next += 1
            answers[request.id] = Answer()
            self.scheduler.add(request)
        while self.step(answers):
            pass
        for lease in leases:
            lease.release()
        assert self.scheduler.running == self.scheduler.waiting == 0
        assert self.blocks.used == 0
        assert self.pool.pins == 0
        return list(answers.values())

    def step(self, answers: dict[str, Answer]) -> bool:
        """One plan, run and committed. False when nothing is left to do."""
        plan = self.scheduler.plan()
        if plan is None:
            return False
        self.plans.append(plan)
        self.pool.upload(plan.uploads)
        for event in self.scheduler.commit(plan, self.runner.run(plan)):
            _note(answers[event.request_id], event)
        return True

    def _retired(self, version) -> None:
        self.pool.forget(version)
        self.store.reclaim(version)


@dataclass(frozen=True)
class Ask:
    """One request of a test."""

    prompt: list[int]
    blend: Mapping[str, float] = field(default_factory=dict)
    params: SamplingParams = field(default_factory=lambda: greedy())
    guide: Guide | None = None
    prediction: Sequence[int] = ()


def greedy(count: int = 6, **others) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, **({"logprobs": 0} | others))


def _note(answer: Answer, event: TokenEvent) -> None:
    answer.prompt_logprobs += event.prompt_logprobs
    if event.token is not None:
        answer.tokens.append(event.token)
    if event.logprob is not None:
        answer.logprobs.append(event.logprob)
    answer.cached = max(answer.cached, event.cached_tokens)
    answer.finish = event.finish or answer.finish
    answer.error = event.error or answer.error
