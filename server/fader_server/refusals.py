"""Loads that were refused a moment ago, by name: repeated instead of tried again."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from fader_adapters.errors import AdapterError, ArenaFull, SourceUnavailable

BROKEN_SECONDS = 30.0
"""How long a refusal is repeated without another look at the source."""
PASSING_SECONDS = 3.0
"""The same for a refusal that time may mend: no room, no answer."""
MAX_REFUSALS = 4096


@dataclass(frozen=True, slots=True)
class _Refusal:
    kind: type[AdapterError]
    text: str
    until: float


class Refusals:
    """The newest of them. Belongs to the event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: OrderedDict[str, _Refusal] = OrderedDict()

    def of(self, name: str) -> AdapterError | None:
        """What a load of this name is refused with for now, as an error of its own."""
        known = self._kept.get(name)
        return known.kind(known.text) if known is not None and self._clock() < known.until else None

    def add(self, name: str, error: AdapterError) -> None:
        passing = isinstance(error, ArenaFull | SourceUnavailable)
        until = self._clock() + (PASSING_SECONDS if passing else BROKEN_SECONDS)
        self._kept[name] = _Refusal(type(error), str(error), until)
        self._kept.move_to_end(name)
        while len(self._kept) > MAX_REFUSALS:
            self._kept.popitem(last=False)

    def forget(self, name: str) -> None:
        self._kept.pop(name, None)
