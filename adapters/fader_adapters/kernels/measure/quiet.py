"""Whether others used the processors meanwhile. Knows Linux's counters only."""

import os
from pathlib import Path

QUIET = 0.03
"""Greatest share of the processors that others may have used for figures to be quoted."""


class Others:
    """From its making to `share()`: what all but this process and its children took."""

    def __init__(self) -> None:
        self._busy, self._all = _counters()
        self._own = _own()

    def share(self) -> float:
        """0 to 1 of all processors' time; NaN where the system does not tell."""
        busy, total = _counters()
        if total <= self._all:
            return float("nan")
        taken = busy - self._busy - (_own() - self._own)
        return max(0.0, taken / (total - self._all))


def _own() -> float:
    times = os.times()  # children count once they were waited for
    return times.user + times.system + times.children_user + times.children_system


def _counters() -> tuple[float, float]:
    """Seconds of all processors: not idle, and all."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0, 0.0
    ticks = [int(word) for word in stat.read_text().split("\n", 1)[0].split()[1:9]]
    second = os.sysconf("SC_CLK_TCK")
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / second, sum(ticks) / second
