"""Which blends the tokens of late were drawn for. Counts only: no names are looked up."""

from collections import Counter
from collections.abc import Sequence

from fader_adapters.spec import Digest, added_up
from fader_server.api.adapter_ports import LeasedTerm

BlendKey = tuple[tuple[Digest, float], ...]
"""(version, weight) of every term, sorted; empty: the base."""


def blend_key(terms: Sequence[LeasedTerm]) -> BlendKey:
    """The same for equal blends, however they are spelled."""
    return tuple(sorted(added_up(terms).items()))


class Traffic:
    """Generated tokens by blend since they were last taken. Belongs to the event loop."""

    def __init__(self) -> None:
        self._tokens: Counter[BlendKey] = Counter()
        self._terms: dict[BlendKey, Sequence[LeasedTerm]] = {}

    def add(self, key: BlendKey, terms: Sequence[LeasedTerm]) -> None:
        """One token of a blend."""
        self._tokens[key] += 1
        self._terms.setdefault(key, terms)

    def take(self) -> tuple[dict[BlendKey, int], dict[BlendKey, Sequence[LeasedTerm]]]:
        """Tokens by blend, and how each blend was named; both start anew."""
        taken = dict(self._tokens), self._terms
        self._tokens, self._terms = Counter(), {}
        return taken
