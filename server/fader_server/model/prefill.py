"""Steps with prompts on the native backend: recorded at a few sizes, then replayed at any.

As with decode steps, a replay is trusted after it gave bit for bit what the model's own code gives:
logits, and all that the tokens leave behind, for of most prompts' tokens no logits are wanted. This
for tokens up to each power of two anew, for code may go another way when there are many. Neither
recordings nor proofs are made where streams would wait for them.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fader_adapters.kernels.backend import Step
from fader_adapters.kernels.cpu import in_place_of
from fader_adapters.kernels.native import StepInputs, StepPlan, Tape, Workspace
from fader_adapters.step_state import LaneWeights
from fader_server.core import Plan
from fader_server.model.batch import AttentionRow, Batch
from fader_server.model.decode import DecodeReplays, Elder, Forward, Moved, decodes, refuted
from fader_server.model.recording import Recorder, Recording
from fader_server.model.replay import Arena
from fader_server.model.shaped import ShapedReplay
from fader_server.model.sizes import SIZES, Size

if TYPE_CHECKING:  # needs greenlet, which a base without states does not
    from fader_server.model.packed_states import PackedStates

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
MOST = Size(1 << 14, 1 << 12)
"""Larger steps run operator by operator."""


class PrefillInputs:
    """The model's inputs at addresses that never change."""

    def __init__(self, *, block_size: int, states: "PackedStates | None" = None) -> None:
        """states: of a base whose layers keep some."""
        self._block_size = block_size
        self._states = states
        self._ids = torch.zeros(1, MOST.tokens, dtype=torch.int64)
        self._positions = torch.zeros(1, MOST.tokens, dtype=torch.int64)
        self._index = torch.zeros(MOST.logits, dtype=torch.int64)

    def batch(self, plan: Plan) -> Batch:
        """What a plan comes to."""
        states = None if self._states is None else self._states.places
        return Batch.from_plan(plan, block_size=self._block_size, device=CPU, states=states)

    def fill(self, batch: Batch) -> tuple[Size, StepInputs]:
        """Write a batch's tokens, positions and wanted logits; the rest is taken from it."""
        size = Size(batch.tokens, batch.logit_index.shape[0])
        self._ids[:, : size.tokens] = batch.input_ids
        self._positions[:, : size.tokens] = batch.position_ids
        self._index[: size.logits] = batch.logit_index
        step = StepInputs(batch.cu_tokens, batch.contexts, batch.block_tables, batch.slots)
        if batch.states is not None:
            step = replace(step, state_from=batch.states.came_from, state_to=batch.states.to)
        return size, step

    def blank(self, size: Size) -> Batch:
        """Two rows of nothing: their keys and values are written nowhere."""
        first, second = size.tokens - 2, 2
        for row in (self._positions[0, :first], self._positions[0, first : size.tokens]):
            row.copy_(torch.arange(row.shape[0]))
        self._ids[:, : size.tokens] = 0
        self._index[: size.logits] = torch.arange(size.logits)
        blocks = -(-first // self._block_size)
        return Batch(
            input_ids=self._ids[:, : size.tokens],
            position_ids=self._positions[:, : size.tokens],
            slots=torch.full((size.tokens,), -1),
            cu_tokens=torch.tensor([0, first, size.tokens], dtype=torch.int32),
            contexts=torch.tensor([first, second], dtype=torch.int32),
            block_tables=torch.zeros(2, blocks, dtype=torch.int32),
            logit_index=self._index[: size.logits],
            rows=(AttentionRow(0, first, first), AttentionRow(first, second, second)),
            sampling=tuple(range(size.logits)),
            scored=(),
            states=None if self._states is None else self._states.made_up((first, second)),
        )


class PrefillReplays:
    """One replay for every step with a prompt; what it cannot take goes the usual way."""

    def __init__(
        self,
        tape: Tape,
        inputs: PrefillInputs,
        *,
        forward: Callable[[Batch, Step | None], torch.Tensor],
        left: Callable[[Batch], list[torch.Tensor]],
        arena: Arena,
        scratch: Workspace,
    ) -> None:
        """forward: the model's own, of the base where there is no Step. left: copies of what the
        batch's tokens have left behind: keys, values, states."""
        self._tape, self._inputs, self._forward = tape, inputs, forward
        self._left = left
        self._arena, self._scratch = arena, scratch
        self._recordings: list[Recording] = []
        self._replay: ShapedReplay | None = None
        self._trusted: set[int] = set()
        """Numbers of bits of the tokens of steps that gave the model's bits."""
        self._enabled = True
        self._elder: Elder[PrefillReplays] | None = None

    def sibling(self, moved: Moved | None) -> "PrefillReplays":
        """One over other sites, in the same memory, as DecodeReplays.sibling.

        It waits for a decode step to prove them, which costs less than a step with a prompt.
        """
        other = PrefillReplays(
            self._tape,
            self._inputs,
            forward=self._forward,
            left=self._left,
            arena=self._arena,
            scratch=self._scratch,
        )
        other._enabled = self._enabled
        other._elder = None if moved is None else Elder(self, moved)
        return other

    def takes(self, plan: Plan) -> bool:
        """Whether the step holds more than decode rows, and wants no logits but those to sample."""
        return (
            self._enabled
            and not decodes(plan)
            and not any(row.wants_prompt_logprobs for row in plan.rows)
            and sum(row.count for row in plan.rows) <= MOST.tokens
            and len(plan.rows) <= MOST.logits
        )

    def run(self, plan: Plan, step: Step | None, forward: Forward) -> torch.Tensor:
        """Logits [rows that sample, vocab], those of `forward`; valid until the next step."""
        assert step is None or isinstance(step, StepPlan)
        batch = self._inputs.batch(plan)
        bits = batch.tokens.bit_length()
        self._inherit(bits)
        if self._replay is not None and bits in self._trusted:
            return self._replay(*self._inputs.fill(batch), step)
        unproven = self._replay is not None and self._elder and not self._elder.moved.proven
        if unproven or any(row.count == 1 for row in plan.rows):
            return forward(batch)  # not now: somebody's next token is in this step
        if self._replay is None:
            logits = forward(batch)  # before the first recording: attention binds its caches here
            self._record()
            return logits
        replay, expected = self._replay, [forward(batch).clone(), *self._left(batch)]

        def found() -> list[torch.Tensor]:
            return [replay(*self._inputs.fill(batch), step), *self._left(batch)]

        reason = refuted(found, expected)
        if reason:
            self._give_up(reason)
            return forward(batch)  # and the keys and values that it wrote are the model's again
        self._trusted.add(bits)
        return expected[0]

    def _inherit(self, bits: int) -> None:
        elder = self._elder
        theirs = None if elder is None else elder.replays._replay
        if elder is None or theirs is None:
            return
        if self._replay is None:
            self._replay = theirs.over(elder.moved.sites)
        if elder.moved.proven and bits in elder.replays._trusted:
            self._trusted.add(bits)

    def _record(self) -> None:
        """One size a step."""
        self._elder = None
        batch = self._inputs.blank(SIZES[len(self._recordings)])
        try:
            recorder = Recorder(self._tape)
            self._recordings.append(recorder.record(lambda: self._forward(batch, None)))
            if len(self._recordings) == len(SIZES):
                arena, scratch = self._arena, self._scratch
                self._replay = ShapedReplay(self._recordings, arena=arena, scratch=scratch)
                self._recordings = []
        except Exception as reason:  # noqa: BLE001 - whatever it is, the usual way is left
            self._give_up(str(reason))

    def _give_up(self, reason: str) -> None:
        self._enabled = False
        self._replay, self._recordings = None, []
        self._trusted.clear()
        log.info("steps with prompts run operator by operator: %s", reason)


class NativeReplays:
    """Both kinds of steps, each in its own way."""

    def __init__(self, decode: DecodeReplays, prefill: PrefillReplays) -> None:
        self.decode, self.prefill = decode, prefill

    def sibling(self, lane: LaneWeights) -> "NativeReplays":
        """See Replays."""
        pairs = [(site.kernel.base, merged) for site, merged in lane.bases.items()]
        same = lane.table is None and not lane.stacks and self.decode.enabled
        sites = in_place_of(pairs) if same else None
        moved = None if sites is None else Moved(sites)
        return NativeReplays(self.decode.sibling(moved), self.prefill.sibling(moved))

    def takes(self, plan: Plan) -> bool:
        """See Replays."""
        return self.decode.takes(plan) or self.prefill.takes(plan)

    def run(self, plan: Plan, step: Step | None, forward: Forward) -> torch.Tensor:
        """See Replays."""
        way = self.decode if self.decode.takes(plan) else self.prefill
        return way.run(plan, step, forward)
