"""Steps of prompts as CUDA graphs: one a bucket of tokens and kind of deltas, captured at start.

A prompt's own work on a GPU is short beside what a model's code costs the host. Knows plans and
batches; how a run is captured is the recorder's business.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

from fader_adapters.kernels.backend import Step
from fader_adapters.kernels.cuda.lora import LoraStep
from fader_adapters.kernels.cuda.lora_rooms import PROMPT_ROWS
from fader_adapters.kernels.cuda.nf4 import PIECE
from fader_adapters.kernels.native import StateRows
from fader_server.core import Plan
from fader_server.model.batch import AttentionRow, Batch, Places
from fader_server.model.decode import Forward
from fader_server.model.graph_inputs import Mirror
from fader_server.model.graph_kinds import Blank, Kind, Record, Run, RunBatch, kind_of
from fader_server.model.state_slots import NOBODY

Array = TypeVar("Array", np.ndarray, torch.Tensor)

_PLACES = -(-(PROMPT_ROWS + 1) // 4) * 4
"""Room for an integer a row and one more, in whole 16 bytes: kernels are compiled for it."""

MOST_TOKENS = 2048
"""Of a captured step: a longer one keeps the device busy while the host prepares what follows."""


def buckets(step_tokens: int) -> list[int]:
    """Tokens of captured steps, ascending: whole pieces of a product over dequantised weights, to
    which fewer tokens would be padded anyway. None for steps of no tokens."""
    most = min(MOST_TOKENS, -(-step_tokens // PIECE) * PIECE)
    sizes = [PIECE] if most else []
    while sizes and sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return sizes


class PromptInputs:
    """One step of up to PROMPT_ROWS prompts of up to `tokens` tokens at fixed addresses.

    Padding tokens belong to no row: slot −1, so they store nothing, and nothing reads what they
    attend to. Padding rows have no tokens and no keys, and their states are nobody's.
    """

    def __init__(
        self,
        *,
        tokens: int,
        context: int,
        block_size: int,
        device: torch.device,
        states: Places | None = None,
    ) -> None:
        """Allocates, on the host too. states: of a base whose layers keep some."""
        self._states = states
        self._tokens, self._context, self._block_size = tokens, context, block_size
        self._columns = -(-context // block_size)
        self._words = Mirror(3 * tokens + PROMPT_ROWS, torch.int64, device)
        self._integers = Mirror(4 * _PLACES + PROMPT_ROWS * self._columns, torch.int32, device)
        self._ids, self._positions, self._slots, self._index = self._of_words(self._words.device)
        self._starts, self._contexts, self._kept, self._tables = self._of_integers(
            self._integers.device
        )
        self._of_words(self._words.open())[2][:] = -1
        self._words.send(0, len(self._words.device))
        self._of_integers(self._integers.open())[2][:] = NOBODY
        self._integers.send(0, len(self._integers.device))

    def _of_words(self, words: Array) -> tuple[Array, Array, Array, Array]:
        """ids, positions, slots [tokens] and the places whose logits are wanted [PROMPT_ROWS]."""
        n = self._tokens
        return words[:n], words[n : 2 * n], words[2 * n : 3 * n], words[3 * n :]

    def _of_integers(self, integers: Array) -> tuple[Array, Array, Array, Array]:
        """cu_tokens [PROMPT_ROWS + 1], contexts [PROMPT_ROWS], where states come from and go to [2,
        PROMPT_ROWS], block tables [PROMPT_ROWS, columns], each at a multiple of 16 bytes."""
        kept = integers[2 * _PLACES : 4 * _PLACES].reshape(2, _PLACES)[:, :PROMPT_ROWS]
        tables = integers[4 * _PLACES :].reshape(PROMPT_ROWS, self._columns)
        return integers[: PROMPT_ROWS + 1], integers[_PLACES:][:PROMPT_ROWS], kept, tables

    def fill(self, plan: Plan, bucket: int) -> None:
        """Send the plan's rows, and padding up to `bucket` tokens."""
        size, words, integers = self._block_size, self._words.open(), self._integers.open()
        ids, positions, slots, index = self._of_words(words)
        starts, contexts, kept, tables = self._of_integers(integers)
        contexts[:] = index[:] = at = sampled = 0
        starts[0] = 0
        for i, row in enumerate(plan.rows):
            stop, end = row.start + row.count, at + row.count
            ids[at:end] = row.tokens
            places = np.arange(row.start, stop)
            positions[at:end] = places
            used = -(-stop // size)
            own = np.asarray(row.sequence.blocks[:used])
            slots[at:end] = own[places // size] * size + places % size
            tables[i, :used] = own
            contexts[i] = stop
            starts[i + 1] = at = end
            if row.samples:
                index[sampled] = end - 1
                sampled += 1
        starts[len(plan.rows) + 1 :] = at
        if self._states is not None:
            kept[:, : len(plan.rows)] = self._states(plan)
            kept[:, len(plan.rows) :] = NOBODY
        ids[at:bucket] = positions[at:bucket] = 0
        slots[at:bucket] = -1
        self._words.send(0, len(words))
        self._integers.send(0, len(integers))

    def batch(self, bucket: int) -> Batch:
        """The first `bucket` tokens as the model's forward takes them; no number ever changes."""
        return Batch(
            input_ids=self._ids[None, :bucket],
            position_ids=self._positions[None, :bucket],
            slots=self._slots[:bucket],
            cu_tokens=self._starts,
            contexts=self._contexts,
            block_tables=self._tables,
            logit_index=self._index,
            rows=tuple(AttentionRow(0, bucket, self._context) for _ in range(PROMPT_ROWS)),
            sampling=tuple(range(PROMPT_ROWS)),
            scored=(),
            states=None if self._states is None else StateRows(self._starts, *self._kept),
        )


class PromptGraphs:
    """Steps of few prompts, of up to the largest bucket of tokens."""

    def __init__(self, inputs: PromptInputs, kinds: Sequence[Kind]) -> None:
        """`kinds`: of the steps that may come."""
        self._inputs = inputs
        self._kinds = kinds
        self._graphs: dict[tuple[int, Kind], Run] = {}
        self._logits = torch.empty(0)
        self._buckets: list[int] = []

    @property
    def captured(self) -> Sequence[tuple[int, Kind]]:
        """(tokens, kind) of every graph."""
        return sorted(self._graphs)

    @torch.inference_mode()
    def capture(
        self,
        sizes: Sequence[int],
        blank: Blank,
        *,
        run: RunBatch,
        record: Record,
    ) -> None:
        """Capture every bucket, the largest first."""
        for bucket in sorted(sizes, reverse=True):
            batch = self._inputs.batch(bucket)
            for kind in self._kinds:
                step = blank(bucket, kind)
                if not self._logits.numel():
                    self._logits = torch.empty_like(run(batch, None))
                self._graphs[bucket, kind] = record(self._work(run, batch, step))
        self._buckets = sorted(sizes)

    def _work(self, run: RunBatch, batch: Batch, step: Step | None) -> Run:
        def work() -> None:
            self._logits.copy_(run(batch, step))

        return work

    def takes(self, plan: Plan) -> bool:
        """Whether every row is more than one token of a prompt without scores, and a bucket holds
        them."""
        return (
            len(plan.rows) <= PROMPT_ROWS
            and plan.tokens <= max(self._buckets, default=0)
            and all(row.count > 1 and not row.wants_prompt_logprobs for row in plan.rows)
        )

    def run(self, plan: Plan, step: Step | None, forward: Forward) -> torch.Tensor:
        """Logits [rows that sample, vocab], those of `forward`; valid until the next step.

        A step whose deltas do not fit the captured buffers runs operator by operator.
        """
        bucket = next(size for size in self._buckets if size >= plan.tokens)
        self._inputs.fill(plan, bucket)
        samples = sum(row.samples for row in plan.rows)
        assert step is None or isinstance(step, LoraStep)
        if step is not None and step.prompt != bucket:
            return forward(self._inputs.batch(bucket))[:samples]
        self._graphs[bucket, kind_of(step)]()
        return self._logits[:samples]
