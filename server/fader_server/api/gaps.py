"""Seconds between the tokens of one choice. Knows times only."""

from collections.abc import Callable

_TOGETHER = 5e-4
"""Tokens that are told of sooner after one another were waiting together: they share what lies
before them, each an equal part."""


class Gaps:
    """Of one choice, from its first token on."""

    def __init__(self, observe: Callable[[float], object], now: float) -> None:
        self._observe = observe
        self._told = self._last = now
        self._more = 0

    def token(self, now: float) -> None:
        """One more came."""
        if self._more and now - self._last >= _TOGETHER:
            self.tell()
        self._more += 1
        self._last = now

    def tell(self) -> None:
        """Of those that came since."""
        for _ in range(self._more):
            self._observe((self._last - self._told) / self._more)
        self._told, self._more = self._last, 0
