"""Made-up steps before the first request: what a step costs only the first time, nobody waits for.

Knows blocks and token ids as integers, as the scheduler does; the runner learns from them.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from itertools import count

from fader_adapters.spec import RowTerms, StepTerms
from fader_server.core import Plan, PlanRow, Request, Runner, SamplingParams, Sequence
from fader_server.engine.blocks import BlockManager
from fader_server.engine.limits import Limits

_log = logging.getLogger(__name__)

_SMALLEST = 3
"""Tokens of the first prompts: more than a decode row has."""
_TIMES = 3
"""So often they come before any other."""
_TWICE = 2
"""Once to be learnt, once to be proven on other tokens."""
_POSITIONS = 23
"""The rows of a decode step stand at so many different positions."""


def warm_up(
    runner: Runner,
    blocks: BlockManager,
    limits: Limits,
    *,
    vocab: int,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run steps of every size, small ones first, and begin none after `seconds`; how many ran.

    Call it on the engine's thread before anything runs. Its blocks are free again afterwards, and
    nothing of it can be found. A step that fails ends it: a request will meet the same, and be
    told.
    """
    ran, began = 0, clock()
    with closing(_steps(blocks, limits, vocab)) as steps:
        try:
            for plan in steps:
                if clock() - began >= seconds:
                    break
                runner.run(plan)
                ran += 1
        except Exception:  # noqa: BLE001 - whatever it is, the server may start
            _log.exception("a made-up step failed")
    fields = {"steps": ran, "seconds": round(clock() - began, 2)}
    _log.info("warmed up", extra={"fields": fields})
    return ran


def _sizes(most: int) -> Iterator[int]:
    """A number of tokens for every number of bits up to that of `most`.

    Odd ones between two powers of two: what is right for them is right for no round number only.
    """
    for bits in range(_SMALLEST.bit_length(), most.bit_length() + 1):
        yield min((1 << bits + 1) // 3 | 1, most)


def _steps(blocks: BlockManager, limits: Limits, vocab: int) -> Generator[Plan]:
    """Prompts of each size; after each, decode steps of up to a quarter as many rows.

    Ends early where the cache has no more blocks.
    """
    taken: list[Sequence] = []
    ids = count(1)

    def taking(tokens: int) -> Sequence | None:
        """A sequence of so many tokens, with blocks; None where they do not fit."""
        total = blocks.blocks_for(tokens)
        if tokens > limits.max_model_len or total > blocks.free:
            return None
        made = [next(ids) % vocab for _ in range(tokens)]
        params = SamplingParams(max_tokens=1, temperature=0.0)
        sequence = Sequence(Request("warm-up", tuple(made), params), made)
        blocks.admit(sequence, [], total=total, sought=0)
        taken.append(sequence)
        return sequence

    def releasing(kept: int) -> None:
        """In reverse: the free blocks stand as they stood."""
        while len(taken) > kept:
            blocks.release(taken.pop())

    def prompt(tokens: int) -> Generator[Plan]:
        """One step of prompts that are a chunk long at most."""
        kept, chunk = len(taken), limits.chunk_size
        counts = [min(chunk, tokens - at) for at in range(0, tokens, chunk)]
        rows = [taking(own) for own in counts]
        if all(rows):
            yield _plan((row, 0, len(row.tokens)) for row in rows if row)
        releasing(kept)

    decoding: list[Sequence] = []
    try:
        for _ in range(_TIMES):
            yield from prompt(_SMALLEST)
        for tokens in _sizes(limits.max_step_tokens):
            yield from prompt(tokens)
            while len(decoding) < min(tokens // 4, limits.max_rows):
                row = taking(_SMALLEST + 7 * len(decoding) % _POSITIONS + 1)
                if row is None:
                    return
                yield _plan([(row, 0, len(row.tokens) - 1)])
                decoding.append(row)
                for _ in range(_TWICE):
                    for one in decoding:
                        one.tokens[-1] = next(ids) % vocab
                    yield _plan((one, len(one.tokens) - 1, 1) for one in decoding)
    finally:
        releasing(0)


def _plan(rows: Iterable[tuple[Sequence, int, int]]) -> Plan:
    """One step of the base: (sequence, start, count) a row."""
    made = tuple(
        PlanRow(sequence, start, own, start + own == len(sequence.tokens))
        for sequence, start, own in rows
    )
    return Plan(made, StepTerms(tuple(RowTerms(row.count) for row in made)))
