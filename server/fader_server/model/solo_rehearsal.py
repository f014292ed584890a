"""Runs a few tokens of a freshly loaded base piece by piece through its own cache, two sequences
side by side, and compares with each sequence at once. Knows module trees; knows no engine.
"""

import logging
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from fader_adapters.errors import first_line
from fader_adapters.kernels.native import Tape
from fader_adapters.kernels.states import StateMaker
from fader_adapters.spec import RowTerms, StepTerms
from fader_adapters.step_state import StepState
from fader_server.core import Plan, PlanRow, Request, SamplingParams, Sequence
from fader_server.errors import ModelUnsupported
from fader_server.model.alone import SoloModel, attend_as_built
from fader_server.model.continuing import continue_scans
from fader_server.model.experts import keep_rows_apart, routed
from fader_server.model.kv_cache import LayerShape
from fader_server.model.mixers import Mixers, found
from fader_server.model.packed_states import PackedStates
from fader_server.model.rehearsal import (
    BOUND,
    BOUND_ROUNDED,
    distance,
    made_up,
    reason,
    rehearse,
    same_bits,
)
from fader_server.model.solo import OwnForward, SoloForward
from fader_server.model.states import StateShape

log = logging.getLogger(__name__)

PIECES = (((0, 0, 3), (1, 0, 7)), ((0, 3, 1), (1, 7, 5)), ((0, 4, 6), (1, 12, 1)))
"""For every step (sequence, first token, tokens): whole prompts, single tokens, chunks behind."""
LENGTHS = (10, 13)
MEASURED = 8
"""Tokens of a sequence whose cache is measured, and half of those of the other."""


@dataclass(frozen=True)
class Apart:
    """How the rows of a model run whose sequences keep states."""

    forward: OwnForward | None
    """None: they share whole forwards."""
    states: PackedStates | None
    """Where the layers that keep states take all rows at once."""
    layers: dict[nn.Module, LayerShape]
    """What attention layers keep in the engine's cache."""
    state: StateShape
    """What a sequence keeps beside it."""


def run_alone(
    model: PreTrainedModel,
    state: StepState,
    source: str,
    *,
    dtype: torch.dtype,
    packed: ModelUnsupported,
    make: StateMaker | None = None,
    tape: Tape | None = None,
) -> Apart:
    """How the rows of this model run. Raises ModelUnsupported, in one line.

    `packed`: why rows cannot share forwards of the model's own code. `make`: of the backend's
    kernels in which states may lie. `tape`: of the native ones.
    """
    continue_scans(model)
    if make is not None and any(True for _ in found(model)):
        kept = rehearse_states(model, source, dtype=dtype, make=make, tape=tape)
        if kept is not None:
            states, layers = kept
            log.info("%s: %d layers keep states in the backend's kernels", source, len(states))
            return Apart(None, states, layers, states.state)
    solo = rehearse_solo(model, state, dtype=dtype, packed=packed)
    shape = measured(solo.solo, made_up(model, 2 * MEASURED).tolist())
    solo.end()
    shared = rehearse_mixers(model, source, dtype=dtype, tape=tape)
    if shared is not None:
        mixers, layers = shared
        log.warning("%s: %d layers run row by row, which is slower", packed, len(mixers))
        return Apart(mixers, None, layers, mixers.state)
    log.warning("%s: its sequences run one by one between their linears, which is slower", packed)
    return Apart(SoloForward(model, state), None, {}, shape)


def rehearse_solo(
    model: PreTrainedModel, state: StepState, *, dtype: torch.dtype, packed: ModelUnsupported
) -> SoloForward:
    """How the sequences of this model run. Raises ModelUnsupported, in one line.

    `packed`: why they cannot share a forward.
    """
    try:
        attend_as_built(model)
        forward = SoloForward(model, state)
        found = _distance(model, forward)
        ahead = _looks_ahead(model)
    except Exception as error:
        raise ModelUnsupported(f"{packed}; one by one: {reason(error)}") from error
    if ahead:
        raise ModelUnsupported(f"{packed}; a token's logits depend on those behind it")
    if not found <= BOUND.get(dtype, BOUND_ROUNDED):
        raise ModelUnsupported(
            f"{packed}; nor does it give in pieces what it gives at once "
            f"(logits differ by {found:.2g} of their spread)"
        )
    return forward


def rehearse_states(
    model: PreTrainedModel,
    source: str,
    *,
    dtype: torch.dtype,
    make: StateMaker,
    tape: Tape | None,
) -> tuple[PackedStates, dict[nn.Module, LayerShape]] | None:
    """The layers of a model that keep their states in the backend's kernels, and the shapes of the
    others' caches. None where they cannot.

    What those kernels compute is causal, and proven in pieces: no need to rehearse the model alone.
    """
    states, apart = None, _nothing
    try:
        states = PackedStates(model, make, tape)
        states.prove(dtype)
        rehearsed = rehearse(model, source, dtype=dtype, aside=states)
        if model.device.type != "cpu":  # a GPU's kernels see to it, step by step
            return states, rehearsed.layers
        apart = keep_rows_apart(model, rehearsed.calls, tape)
        if same_bits(model, states):
            return states, rehearsed.layers
    except Exception as error:  # noqa: BLE001 - whatever it is, the model's own code is left
        log.info("%s: states cannot lie in the backend's kernels: %s", source, first_line(error))
    attend_as_built(model)
    apart()
    if states is not None:
        states.end()
    return None


def rehearse_mixers(
    model: PreTrainedModel, source: str, *, dtype: torch.dtype, tape: Tape | None
) -> tuple[Mixers, dict[nn.Module, LayerShape]] | None:
    """The layers of a model that was rehearsed alone whose rows run alone while they share the
    rest, and the shapes of the others' caches. None where they cannot share it.
    """
    mixers = Mixers(model)
    if not len(mixers):
        return None
    apart = _nothing
    try:
        rehearsed = rehearse(model, source, dtype=dtype, aside=mixers)
        if model.device.type != "cpu":  # a GPU's kernels see to it, step by step
            return mixers, rehearsed.layers
        apart = keep_rows_apart(model, rehearsed.calls, tape)
        if same_bits(model, mixers):
            return mixers, rehearsed.layers
    except ModelUnsupported as error:
        log.debug("%s: rows cannot share the rest: %s", source, error)
    attend_as_built(model)
    apart()
    mixers.end()
    return None


def _nothing() -> None:
    pass


def _distance(model: PreTrainedModel, forward: SoloForward) -> float:
    """The largest distance of any token's logits, in pieces, from those of its sequence at once."""
    parts = torch.split(made_up(model, sum(LENGTHS)), list(LENGTHS))
    sequences = [_sequence(part.tolist()) for part in parts]
    logits: list[list[torch.Tensor]] = [[] for _ in LENGTHS]
    with torch.inference_mode():
        for step in PIECES:
            rows = tuple(PlanRow(sequences[i], at, count, False) for i, at, count in step)
            plan = Plan(rows, StepTerms(tuple(RowTerms(row.count) for row in rows)))
            every = [list(range(row.count)) for row in rows]
            parts = forward.logits(plan, every, lambda _: None)
            for (i, _, _), part in zip(step, parts, strict=True):
                logits[i].append(part)
        at_once = [_at_once(model, sequence.tokens) for sequence in sequences]
    pairs = zip(logits, at_once, strict=True)
    return max(distance(torch.cat(parts), whole) for parts, whole in pairs)


def _looks_ahead(model: PreTrainedModel) -> bool:
    """Whether another last token changes what comes before it, by a single bit.

    Not asked of mixtures of experts, whose products are of other shapes then.
    """
    if any(True for _ in routed(model)):
        return False
    tokens = made_up(model, LENGTHS[0]).tolist()
    other = [*tokens[:-1], tokens[0]]
    with torch.inference_mode():
        pair = [_at_once(model, ids)[:-1] for ids in (tokens, other)]
    return not torch.equal(*pair)


def _at_once(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([tokens], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0]


def _sequence(tokens: list[int]) -> Sequence:
    request = Request("rehearsal", tuple(tokens), SamplingParams())
    return Sequence(request, tokens, blocks=[1])


def measured(solo: SoloModel, ids: list[int]) -> StateShape:
    """What a sequence's cache takes, by two short ones of these tokens."""
    caches = [solo.new_cache() for _ in range(2)]
    with torch.inference_mode():
        for count, cache in zip((MEASURED, 2 * MEASURED), caches, strict=True):
            solo.logits(ids[:count], 0, cache, [])
    return StateShape.between(*caches, tokens=MEASURED)
