"""What tenants have of something bounded. Counts only."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Portions:
    """How many each tenant has. Belongs to the event loop."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        """Of the tenants that have one."""

    @property
    def total(self) -> int:
        return self._counts.total()

    def full(self, tenant: str, most: int) -> bool:
        """Whether it may have no more: `most` are taken, and it has its equal part of them. One
        that has less, or none, is not kept out by those that have more."""
        equal = max(1, most // len(self._counts.keys() | {tenant}))
        return self.total >= most and self._counts[tenant] >= equal

    @contextmanager
    def one(self, tenant: str) -> Iterator[None]:
        """One more for the tenant."""
        self._counts[tenant] += 1
        try:
            yield
        finally:
            self._counts[tenant] -= 1
            if not self._counts[tenant]:
                del self._counts[tenant]
