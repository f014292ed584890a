"""Runs a step so that one bad row costs only itself. Knows rows and exceptions, not tensors."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from traceback import format_exc

from fader_adapters.spec import Digest, RowTerms, StepTerms, Upload
from fader_server.core import (
    Launched,
    Plan,
    PlanRow,
    Request,
    RowResult,
    Runner,
    SamplingParams,
    Sequence,
)
from fader_server.engine.blocks import NULL_BLOCK
from fader_server.errors import EngineFault

_log = logging.getLogger(__name__)

_NO_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""How torch's CPU allocator, CUDA and its libraries say so; an OutOfMemoryError has a name."""

_PASSING = (
    "out of memory",
    "invalid argument",
    "invalid configuration",
    "out of resources",
    "stream is capturing",
    "error during capture",
    "capturing stream has unjoined work",
    "uncaptured work in another stream",
)
"""CUDA's refusals of one call or capture, which leave the device as it was."""


@dataclass(slots=True)
class StepOutcome:
    """Every row of a plan is in exactly one of these; guesses may be in none."""

    done: list[tuple[Plan, list[RowResult]]] = field(default_factory=list)
    failed: list[tuple[Sequence, Exception]] = field(default_factory=list)
    """Rows that fail even alone."""
    crowded: list[tuple[Sequence, Exception]] = field(default_factory=list)
    """Rows left out because the device ran out of memory, newest first."""
    lost: Exception | None = None
    """What says that nothing will run on the device any more; rows may then be in no list."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """How a step begins that the device computes by itself, and what there is to do meanwhile."""

    launch: Callable[[Plan], Launched]
    meanwhile: Callable[[Plan, Launched | None], None]
    """Called once a step, with what began or None; what it raises is no row's fault."""


def run_isolated(runner: Runner, plan: Plan, *, overlap: Overlap | None = None) -> StepOutcome:
    """Run a plan; after an exception run its halves, down to the rows at fault.

    Running rows again is safe: keys and values land in the same places, and nothing is
    committed yet. Out of memory is nobody's fault: the newest row is left out instead.
    """
    outcome = StepOutcome()
    _run(runner, plan, outcome, overlap)
    return outcome


def upload_isolated(
    upload: Callable[[tuple[Upload, ...]], None], uploads: tuple[Upload, ...]
) -> dict[Digest, Exception]:
    """Bring versions in; after an exception one by one. Returns those that cannot be brought."""
    try:
        upload(uploads)
    except Exception:  # noqa: BLE001 - told apart one by one below
        _log.warning("bringing %d adapters in failed\n%s", len(uploads), format_exc())
    else:
        return {}
    lost: dict[Digest, Exception] = {}
    for one in uploads:
        try:
            upload((one,))
        except Exception as error:  # noqa: BLE001 - it must cost only its requests
            lost[one.data.spec.version] = _bare(error)
    return lost


def probe(runner: Runner) -> Exception | None:
    """What the device raises for one token of the base, in the null block; None: it works."""
    request = Request("probe", (0,), SamplingParams(max_tokens=1, temperature=0.0))
    sequence = Sequence(request, [0], blocks=[NULL_BLOCK])
    plan = Plan((PlanRow(sequence, 0, 1, True),), StepTerms((RowTerms(1),)))
    try:
        runner.run(plan)
    except Exception as error:  # noqa: BLE001 - any exception is the answer
        return _bare(error)
    finally:
        sequence.blocks = []  # it has ended: what is kept for those that run is free again
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, CUDA's or the CPU allocator's way to say so."""
    return (
        isinstance(error, MemoryError)
        or any(c.__name__ == "OutOfMemoryError" for c in type(error).__mro__)
        or (isinstance(error, RuntimeError) and any(m in str(error) for m in _NO_MEMORY))
    )


def is_device_lost(error: BaseException) -> bool:
    """CUDA's errors stick: after one every call of the process fails, until it is started anew."""
    told = str(error)
    return (
        isinstance(error, RuntimeError)
        and not is_out_of_memory(error)
        and (
            any(c.__name__ == "AcceleratorError" for c in type(error).__mro__)
            or "CUDA error" in told
            or "CUDA driver error" in told
            or "Triton Error [CUDA]" in told
        )
        and not any(name in told for name in _PASSING)
    )


def without(plan: Plan, dropped: set[int]) -> Plan | None:
    """The plan without the rows at these indices; None when no row is left. No uploads."""
    kept = [i for i in range(len(plan.rows)) if i not in dropped]
    if not kept:
        return None
    terms = StepTerms(tuple(plan.terms.rows[i] for i in kept))
    return Plan(tuple(plan.rows[i] for i in kept), terms)


def _run(runner: Runner, plan: Plan, outcome: StepOutcome, overlap: Overlap | None = None) -> None:
    failure: Exception | None = None
    launched = None
    if overlap is not None:
        try:
            launched = overlap.launch(plan)
        except Exception as error:  # noqa: BLE001 - as below
            failure = _told(plan, error)
        overlap.meanwhile(plan, launched)
    if failure is None:
        failure = _finish(runner, plan, outcome, launched)
    if failure is not None:
        launched = None  # what it holds on the device goes before rows run again
        _split(runner, plan, outcome, failure)


def _finish(
    runner: Runner, plan: Plan, outcome: StepOutcome, launched: Launched | None
) -> Exception | None:
    """The results of a step into `outcome`, or why there are none."""
    try:
        results = runner.run(plan) if launched is None else launched.results()
        if len(results) != len(plan.rows):
            raise EngineFault(f"expected {len(plan.rows)} results, got {len(results)}")
        outcome.done.append((plan, results))
    except Exception as error:  # noqa: BLE001 - whatever it is, it must cost only its rows
        return _told(plan, error)
    return None


def _told(plan: Plan, error: Exception) -> Exception:
    _log.warning("a step of %d rows failed\n%s", len(plan.rows), format_exc())
    return _bare(error)


def _bare(error: Exception) -> Exception:
    """The error without its frames: they would keep the failed step's tensors alive.

    For the same reason the log gets text: a handler may keep its records.
    """
    error.__context__ = None
    return error.with_traceback(None)


def _split(runner: Runner, plan: Plan, outcome: StepOutcome, error: Exception) -> None:
    count = len(plan.rows)
    if is_device_lost(error):
        outcome.lost = error
        return
    guesses = {i for i, row in enumerate(plan.rows) if row.guesses}
    if guesses:  # nothing is lost with them
        parts = [without(plan, guesses)]
    elif is_out_of_memory(error):
        newest = max(range(count), key=lambda i: plan.rows[i].sequence.arrival)
        outcome.crowded.append((plan.rows[newest].sequence, error))
        parts = [without(plan, {newest})]
    elif count == 1:
        outcome.failed.append((plan.rows[0].sequence, error))
        return
    else:
        middle = count // 2
        parts = [without(plan, set(range(middle, count))), without(plan, set(range(middle)))]
    for part in parts:
        if part is not None and outcome.lost is None:
            _run(runner, part, outcome)
