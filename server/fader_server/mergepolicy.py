"""`--merge auto`: when a blend is worth a lane. Decides from counted tokens, does nothing."""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fader_server.api.traffic import BlendKey

BASE_KEY: BlendKey = ()
DROP_RATIO = 0.5
"""A lane goes when its share falls below this part of what brought it."""
LEAST_TOKENS = 64
"""In the whole window; less is no traffic to judge by."""
BACKOFF = 10.0
"""Windows to leave a blend alone that could not be merged."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now, and the numbers that say why."""

    action: Literal["merge", "drop"]
    blend: BlendKey
    share: float
    tokens: int
    """Of all blends in the window."""


class Policy:
    """Merge the blend that has more than `share` of the tokens of `seconds`; drop it below half.

    The window starts anew after every decision, so that two lie `seconds` apart at least.
    """

    def __init__(self, *, share: float, seconds: float) -> None:
        self._share = share
        self._seconds = seconds
        self._window: deque[tuple[float, Mapping[BlendKey, int]]] = deque()
        self._since: float | None = None
        self._shunned: dict[BlendKey, float] = {}

    def observe(
        self, now: float, tokens: Mapping[BlendKey, int], merged: BlendKey | None
    ) -> Decision | None:
        """`tokens` were drawn since the last call, `merged` is the open lane's blend."""
        if self._since is None:
            self._since = now
        self._window.append((now, tokens))
        while self._window[0][0] <= now - self._seconds:
            self._window.popleft()
        if now - self._since < self._seconds:
            return None
        decision = self._decide(now, merged)
        if decision is not None:
            self._since = now
            self._window.clear()
        return decision

    def shun(self, blend: BlendKey, now: float) -> None:
        """It could not be merged: do not ask again for a while."""
        self._shunned[blend] = now + BACKOFF * self._seconds

    def _decide(self, now: float, merged: BlendKey | None) -> Decision | None:
        counts: Counter[BlendKey] = Counter()
        for _, tokens in self._window:
            counts.update(tokens)
        total = counts.total()
        if total < LEAST_TOKENS:
            return None
        if merged is not None and counts[merged] / total >= DROP_RATIO * self._share:
            return None
        self._shunned = {key: until for key, until in self._shunned.items() if until > now}
        for blend, count in counts.most_common():
            if count / total <= self._share:
                break
            if blend != BASE_KEY and blend not in self._shunned:
                return Decision("merge", blend, count / total, total)
        if merged is not None:
            return Decision("drop", merged, counts[merged] / total, total)
        return None
