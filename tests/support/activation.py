"""Where activated adapters apply, by the definition, slowly: what the engine is compared with."""

from collections.abc import Sequence

from fader_adapters.spec import Term
from fader_server.core import Request


def beginning(prompt: Sequence[int], invocation: Sequence[int]) -> float:
    """Position of the first token that the adapter applies to; infinite where it is not invoked."""
    if not invocation:
        return 0
    count = len(invocation)
    places = range(len(prompt) - count + 1)
    found = [at for at in places if list(prompt[at : at + count]) == list(invocation)]
    return max(found, default=float("inf"))


def terms_at(request: Request, position: int) -> tuple[Term, ...]:
    """The terms of the blend that apply to one token."""
    return tuple(
        term
        for term in request.blend.terms
        if beginning(request.prompt, request.adapters[term.version].spec.invocation) <= position
    )
