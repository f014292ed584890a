"""What a row's result means for its sequence: the event, and whether it is the last."""

from fader_server.core import (
    FinishReason,
    PlanRow,
    RowResult,
    TokenEvent,
    TokenLogprob,
)


def outcome(row: PlanRow, result: RowResult, max_model_len: int) -> TokenEvent | None:
    """Take a computed row in: tokens and counters of its sequence move on.

    None while there is nothing to tell: a chunk in the middle of a prompt. Raises EngineFault when
    its guide does.
    """
    sequence = row.sequence
    sequence.computed = row.start + row.count
    scored = _unsent(row, result) if result.prompt_logprobs else ()
    if row.samples:
        return _append(row, result, scored, max_model_len)
    if sequence.computed == len(sequence.tokens):
        return TokenEvent(
            sequence.request.id,
            prompt_logprobs=scored,
            cached_tokens=sequence.cached_tokens,
            finish="length",
        )
    return TokenEvent(sequence.request.id, prompt_logprobs=scored) if scored else None


def _append(
    row: PlanRow, result: RowResult, scored: tuple[TokenLogprob, ...], max_model_len: int
) -> TokenEvent:
    sequence, token = row.sequence, result.token
    assert token is not None, "a row that samples has a token"
    guide = sequence.request.guide
    if guide is not None:
        guide.accept(token)
    sequence.tokens.append(token)
    sequence.decoding = True
    params = sequence.request.params
    output = sequence.output_len
    finish: FinishReason | None = None
    stops = output > params.min_tokens and token in params.stop_token_ids
    if stops or (guide is not None and guide.ended):
        finish = "stop"
    elif output >= params.max_tokens or len(sequence.tokens) >= max_model_len:
        finish = "length"
    cached = sequence.cached_tokens if output == 1 or finish else 0
    return TokenEvent(
        sequence.request.id,
        token,
        result.logprob,
        scored,
        cached,
        finish,
        guessed=bool(row.guesses),
    )


def _unsent(row: PlanRow, result: RowResult) -> tuple[TokenLogprob, ...]:
    """The row's prompt logprobs without those sent before a preemption."""
    sequence = row.sequence
    fresh = result.prompt_logprobs[max(0, sequence.prompt_logprobs_sent - row.start) :]
    sequence.prompt_logprobs_sent += len(fresh)
    return fresh
