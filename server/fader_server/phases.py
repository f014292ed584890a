"""Which blend computes which tokens of a request: activated adapters apply from a place in its
prompt on. Knows prompts and blends; nothing of steps and caches."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fader_adapters.spec import AdapterData, Blend, Digest


@dataclass(frozen=True, slots=True)
class Phase:
    """Tokens of a request that one blend computes, up to the next phase's."""

    start: int
    """Position of the first."""
    blend: Blend


def phases_of(
    prompt: Sequence[int], blend: Blend, adapters: Mapping[Digest, AdapterData]
) -> tuple[Phase, ...]:
    """The phases of a request, the first from 0; the last goes on over what is generated.

    A term whose version has invocation tokens is in it from the start of their last occurrence in
    the prompt on, as in PEFT, and nowhere without one; any other always.
    """
    starts: dict[Digest, int | None] = {}
    for term in blend.terms:
        data = adapters.get(term.version)
        invocation = () if data is None else data.spec.invocation
        starts[term.version] = last_occurrence(prompt, invocation) if invocation else 0
    phases: list[Phase] = []
    for at in sorted({0, *(start for start in starts.values() if start is not None)}):
        there = [t for t in blend.terms if (own := starts[t.version]) is not None and own <= at]
        phases.append(Phase(at, blend if len(there) == len(blend.terms) else Blend(tuple(there))))
    return tuple(phases)


def last_occurrence(tokens: Sequence[int], sought: Sequence[int]) -> int | None:
    """Where `sought`, at least one token, begins for the last time; None: nowhere."""
    try:
        text, key = array("I", tokens), array("I", sought)
    except OverflowError:  # an id of no vocabulary, which is refused before anything runs
        return None
    whole, part, size = text.tobytes(), key.tobytes(), text.itemsize
    at = whole.rfind(part)
    while at % size and at >= 0:  # across two tokens
        at = whole.rfind(part, 0, at + len(part) - 1)
    return at // size if at >= 0 else None
