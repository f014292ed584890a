"""A base, its cache, a pool and a scheduler, stepped by hand and timed. Knows no profiler."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from fader_adapters.kernels.tables import Tables
from fader_adapters.parse import read_adapter
from fader_adapters.pool import Pool
from fader_adapters.source import LocalSources
from fader_adapters.spec import BASE, AdapterSpec, Blend, Term
from fader_server.core import Plan, Request, SamplingParams
from fader_server.engine.blocks import BlockManager
from fader_server.engine.limits import Limits
from fader_server.engine.scheduler import Scheduler
from fader_server.engine.warmup import warm_up
from fader_server.model.kernels import choose_attention, choose_distributions
from fader_server.model.kv_cache import KVCache
from fader_server.model.loaded import LoadedBase
from fader_server.model.runner import ModelRunner
from fader_server.model.sampler import Sampler

BLOCK = 16
CHUNK = 256
WARM_SECONDS = 60.0
"""Enough for every size of step that is measured here."""


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """One adapter version in host memory."""

    spec: AdapterSpec
    flat: torch.Tensor


def read_adapters(folder: Path, base: LoadedBase, count: int) -> list[HostAdapter]:
    """The first `count` PEFT adapters under `folder`, by name."""
    found = []
    for path in sorted(folder.iterdir())[:count]:
        raw = LocalSources((folder,)).fetch(path.name)
        parsed = read_adapter(raw, base.installed.spec, dtype=base.dtype)
        flat = torch.empty(parsed.spec.numel, dtype=parsed.dtype)
        parsed.write(flat)
        found.append(HostAdapter(parsed.spec, flat))
    return found


@dataclass(slots=True)
class Steps:
    """Times of some steps, in milliseconds."""

    plan: list[float]
    run: list[float]
    commit: list[float]
    tensor: float = 0.0
    """All of the steps' operators and native calls together."""

    @property
    def wall(self) -> float:
        return sum(self.plan) + sum(self.run) + sum(self.commit)


class Marks:
    """The moments it was called at, in seconds."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self) -> None:
        self.at.append(time.perf_counter())


class Rig:
    """A base, its cache, a pool and a scheduler, driven by hand."""

    def __init__(
        self, base: LoadedBase, adapters: list[HostAdapter], *, rows: int, length: int
    ) -> None:
        per_row = -(-length // BLOCK) + 1
        arena = max(1, sum(a.flat.numel() for a in adapters)) + 4096
        tables = Tables(torch.zeros(arena, dtype=base.dtype), len(base.installed.spec.linears))
        self._pool = Pool(tables)
        cache = KVCache(
            base.layers,
            blocks=rows * per_row + 1,
            block_size=BLOCK,
            dtype=base.dtype,
            device=base.device,
        )
        attention = choose_attention(base, block_size=BLOCK)
        self._runner = ModelRunner(
            base,
            cache=cache,
            tables=tables,
            attention=attention,
            sampler=Sampler(choose_distributions(base)),
        )
        self._rows, self._adapters = rows, adapters
        self._limits = Limits(rows, rows + CHUNK, CHUNK, length)
        self._blocks = rows * per_row + 1
        self._scheduler = self._fresh()
        blocks = self._scheduler.blocks
        warm_up(self._runner, blocks, self._limits, vocab=base.vocab_size, seconds=WARM_SECONDS)

    def _fresh(self) -> Scheduler:
        """A scheduler without requests or cached prefixes."""
        blocks = BlockManager(self._blocks, block_size=BLOCK)
        return Scheduler(self._limits, blocks=blocks, pool=self._pool)

    def fill(self, prompts: list[tuple[int, ...]], max_tokens: int) -> None:
        """Start over with these prompts, the i-th on the i-th adapter, in turn."""
        self._scheduler = self._fresh()
        for number, prompt in enumerate(prompts):
            adapter = self._adapters[number % len(self._adapters)] if self._adapters else None
            blend = Blend.of([Term(adapter.spec.version, 1.0)]) if adapter else BASE
            params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
            data = {adapter.spec.version: adapter} if adapter else {}
            self._scheduler.add(Request(f"r{number}", prompt, params, blend, data))

    def empty(self) -> None:
        """End every request, so that the pool's pins are given back."""
        for number in range(self._rows):
            self._scheduler.abort(f"r{number}")

    def prefill(self, rows: int) -> dict[str, list[int]]:
        """Step until every row decodes; the tokens that came on the way."""
        tokens: dict[str, list[int]] = {}
        while True:
            plan, came = self.step(lambda: None)
            for name, token in came:
                tokens.setdefault(name, []).append(token)
            if len(tokens) == rows and plan.tokens == rows:
                return tokens

    def step(self, mark: Callable[[], None]) -> tuple[Plan, list[tuple[str, int]]]:
        """One step; `mark` is called before it and after plan, run and commit."""
        mark()
        plan = self._scheduler.plan()
        assert plan is not None
        mark()
        self._pool.upload(plan.uploads)
        results = self._runner.run(plan)
        mark()
        events = self._scheduler.commit(plan, results)
        mark()
        assert not [event for event in events if event.error]
        return plan, [(e.request_id, e.token) for e in events if e.token is not None]

    def steps(self, count: int) -> Steps:
        """`count` decode steps, timed."""
        times = Steps([], [], [])
        for _ in range(count):
            clock = Marks()
            plan, _ = self.step(clock)
            assert plan.tokens == self._rows, "every step of the measurement must be pure decode"
            phases = [(b - a) * 1e3 for a, b in pairwise(clock.at)]
            for phase, value in zip((times.plan, times.run, times.commit), phases, strict=True):
                phase.append(value)
        return times
