"""Decode steps as CUDA graphs: one a bucket of rows and kind of deltas, captured at start, and
those of prompts beside them.

Whatever changes between steps reaches a graph through buffers at fixed addresses. Knows plans and
batches; how a run is captured is the recorder's business.
"""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from triton.errors import TritonError

from fader_adapters.errors import first_line
from fader_adapters.kernels.backend import Step
from fader_adapters.kernels.cuda.backend import CudaBackend
from fader_adapters.kernels.cuda.lora import ROW_BUCKETS, LoraStep
from fader_adapters.kernels.tables import Tables
from fader_adapters.step_state import LaneWeights
from fader_server.core import Plan
from fader_server.model.attention import PagedAttention
from fader_server.model.batch import Batch, Places
from fader_server.model.cuda_attention import CudaAttention
from fader_server.model.decode import Forward, decodes
from fader_server.model.graph_inputs import GraphInputs
from fader_server.model.graph_kinds import (
    EXPERT_KINDS,
    Blank,
    Kind,
    Record,
    Run,
    RunBatch,
    every_kind,
    kind_of,
    vectors,
)
from fader_server.model.kv_cache import KVCache
from fader_server.model.loaded import LoadedBase
from fader_server.model.prompt_graphs import PromptGraphs, PromptInputs
from fader_server.model.prompt_graphs import buckets as prompt_buckets

log = logging.getLogger(__name__)

_FAULTS = (RuntimeError, TritonError)
"""What a capture ends in where a device or a compiler refuses it."""

WARM_TOKENS = (100, 300)
"""Prompts run once at start, so that no request waits for a compiler: fused and dequantised."""


class GraphRecorder:
    """Captures into torch.cuda graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self.checks = True
        """Whether work that waits for the device is refused before it is captured, for a capture
        that fails may leave torch's allocator in one. It takes a mode of the whole process: only
        for as long as no other thread works on the device."""

    def __call__(self, run: Run) -> Run:
        """Runs `run` once as it is, so that everything is compiled and allocated, then captures.
        Raises RuntimeError; the thread's stream is what it was."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                if self.checks:
                    _run_without_waits(run)
                else:
                    run()
        finally:
            current.wait_stream(self._stream)  # whatever failed: its memory may be given back
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        with torch.cuda.stream(current), capture:  # torch's own way back is not taken after errors
            run()
        self._pool = self._pool or graph.pool()
        return graph.replay


def _run_without_waits(run: Run) -> None:
    """Raises RuntimeError for work that waits for the device, unless that is when it first runs."""
    with suppress(RuntimeError), _waits_refused():
        run()
        return
    run()
    with _waits_refused():
        run()


@contextmanager
def _waits_refused() -> Iterator[None]:
    """Operators that let the host wait raise RuntimeError, on every thread."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells once that it does not know every wait
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class DecodeGraphs:
    """Decode steps of up to the largest bucket of rows, and steps of prompts where those were
    captured, too; steps it cannot take go the usual way."""

    def __init__(self, inputs: GraphInputs, blank: Blank, kinds: Sequence[Kind]) -> None:
        """`kinds`: of the steps that may come."""
        self._inputs = inputs
        self._blank = blank
        self._kinds = kinds
        self._graphs: dict[tuple[int, Kind], Run] = {}
        self._logits = torch.empty(0)
        self._buckets: list[int] = []
        self._capture: Callable[[int, Kind], Run] | None = None
        self._failed = False
        self.prompts: PromptGraphs | None = None

    @property
    def captured(self) -> Sequence[tuple[int, Kind]]:
        """(rows, kind) of every graph."""
        return sorted(self._graphs)

    @torch.inference_mode()
    def capture(self, buckets: Sequence[int], *, run: RunBatch, record: Record) -> None:
        """Capture every bucket, the largest first: the others then fit into its memory."""
        self._buckets = sorted(buckets)

        def capture(bucket: int, kind: Kind) -> Run:
            batch, step = self._inputs.batch(bucket), self._blank(bucket, kind)
            if not self._logits.numel():
                self._logits = torch.empty_like(run(batch, step))
            return record(self._work(run, batch, step))

        self._capture = capture
        for bucket in reversed(self._buckets):
            for kind in self._kinds:
                self._graphs[bucket, kind] = capture(bucket, kind)

    def sibling(self, lane: LaneWeights) -> "DecodeGraphs":
        """The same for a lane's weights, without prompts: each bucket is captured when a step first
        asks for it; steps that cannot be captured run operator by operator."""
        other = DecodeGraphs(self._inputs, self._blank, self._kinds)
        other._logits, other._buckets = self._logits, self._buckets
        other._capture = self._capture
        return other

    def _work(self, run: RunBatch, batch: Batch, step: Step | None) -> Run:
        out = self._logits[: batch.tokens]

        def work() -> None:
            out.copy_(run(batch, step))

        return work

    def takes(self, plan: Plan) -> bool:
        """Whether every row of the step is one token that samples, or none is, and a bucket holds
        them."""
        if decodes(plan):
            return len(plan.rows) <= self._logits.shape[0]
        return self.prompts is not None and self.prompts.takes(plan)

    def run(self, plan: Plan, step: Step | None, forward: Forward) -> torch.Tensor:
        """Logits [rows, vocab], those of `forward`; valid until the next step.

        A step whose deltas do not fit the captured buffers runs operator by operator.
        """
        if self.prompts is not None and not decodes(plan):
            return self.prompts.run(plan, step, forward)
        return self._run(plan, step, forward, None)

    def run_ahead(
        self, plan: Plan, step: Step | None, forward: Forward, tokens: torch.Tensor
    ) -> torch.Tensor:
        """The same; tokens [rows] int64 on the device are those of the rows."""
        return self._run(plan, step, forward, tokens)

    def _run(
        self, plan: Plan, step: Step | None, forward: Forward, tokens: torch.Tensor | None
    ) -> torch.Tensor:
        rows = len(plan.rows)
        bucket = min(size for size in self._buckets if size >= rows)
        self._inputs.fill(plan, bucket, tokens)
        assert step is None or isinstance(step, LoraStep)
        if step is not None and step.bucket != bucket:
            return forward(self._inputs.batch(bucket))[:rows]
        kind = kind_of(step)
        if (bucket, kind) not in self._graphs and not self._failed:
            self._graphs.update(self._captured_late(bucket, kind))
        graph = self._graphs.get((bucket, kind))
        if graph is None:
            return forward(self._inputs.batch(bucket))[:rows]
        graph()
        return self._logits[:rows]

    def _captured_late(self, bucket: int, kind: Kind) -> dict[tuple[int, Kind], Run]:
        """Empty where it cannot be captured: that is told, and nothing more is tried."""
        assert self._capture is not None
        try:
            return {(bucket, kind): self._capture(bucket, kind)}
        except _FAULTS as error:
            self._failed = True
            log.warning("a lane's steps run without further CUDA graphs: %s", first_line(error))
            return {}


def capture(
    base: LoadedBase,
    *,
    cache: KVCache,
    attention: PagedAttention,
    tables: Tables,
    run: RunBatch,
    record: Record | None = None,
) -> DecodeGraphs | None:
    """The graphs of a base, with their time and memory in the log; None where it has none.

    A model whose forward asks the host for a value cannot be captured: that is told, once.
    """
    backend = base.backend
    if not isinstance(backend, CudaBackend) or not isinstance(attention, CudaAttention):
        return None
    most = next((size for size in ROW_BUCKETS if size >= attention.max_rows), ROW_BUCKETS[-1])
    buckets = [size for size in ROW_BUCKETS if size <= most]
    places = None
    if base.packed_states is not None:
        base.packed_states.settle()
        places = base.packed_states.places
    inputs = GraphInputs(
        rows=most,
        context=attention.max_context,
        block_size=cache.block_size,
        device=base.device,
        states=places,
    )

    def blank(rows: int, kind: Kind) -> Step | None:
        stacks = kind in EXPERT_KINDS
        step = backend.blank(tables, rows, vectors=vectors(kind), stacks=stacks)
        return None if kind == "base" else step

    every = every_kind(stacks=bool(base.installed.stacks))
    graphs, record = DecodeGraphs(inputs, blank, every), record or GraphRecorder(base.device)
    started, free = time.perf_counter(), _free(base.device)
    try:
        _warm(inputs, run, backend.blank(tables, None, vectors=True, stacks=True))
        warmed = time.perf_counter()
        graphs.capture(buckets, run=run, record=record)
    except _FAULTS as error:
        log.warning("decode steps run without CUDA graphs: %s", first_line(error))
        return None
    sizes = prompt_buckets(attention.max_tokens)
    try:
        if sizes:
            graphs.prompts = _capture_prompts(
                *(backend, attention, every),
                cache=cache, tables=tables, run=run, record=record, sizes=sizes, states=places,
            )  # fmt: skip
    except _FAULTS as error:
        log.warning("steps of prompts run without CUDA graphs: %s", first_line(error))
    if isinstance(record, GraphRecorder):
        record.checks = False  # from now on other threads work, too
    prompts = graphs.prompts
    fields = {
        "graphs": len(graphs.captured) + (0 if prompts is None else len(prompts.captured)),
        "compile_seconds": round(warmed - started, 2),
        "capture_seconds": round(time.perf_counter() - warmed, 2),
        "bytes": max(0, free - _free(base.device)),
    }
    log.info("decode graphs", extra={"fields": fields})
    return graphs


def _capture_prompts(
    backend: CudaBackend,
    attention: CudaAttention,
    kinds: Sequence[Kind],
    *,
    cache: KVCache,
    tables: Tables,
    run: RunBatch,
    record: Record,
    sizes: Sequence[int],
    states: Places | None,
) -> PromptGraphs:
    backend.reserve_prompts(tables, sizes)
    prompts = PromptGraphs(
        PromptInputs(
            tokens=sizes[-1],
            context=attention.max_context,
            block_size=cache.block_size,
            device=cache.device,
            states=states,
        ),
        kinds,
    )

    def blank(tokens: int, kind: Kind) -> Step | None:
        stacks = kind in EXPERT_KINDS
        step = backend.blank_prompt(tables, tokens, vectors=vectors(kind), stacks=stacks)
        return None if kind == "base" else step

    prompts.capture(sizes, blank, run=run, record=record)
    return prompts


@torch.inference_mode()
def _warm(inputs: GraphInputs, run: RunBatch, step: Step) -> None:
    """Have the kernels of prefill steps compiled."""
    for tokens in WARM_TOKENS:
        run(inputs.prompt(tokens), step)


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
