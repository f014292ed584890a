"""What a tenant may ask for in a minute: calls and tokens, each in a bucket that fills evenly.

A call is counted when it is admitted, with every token that it may come to; what it did not need is
given back at its end, and all of it when the engine refuses it.
"""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack

from fader_server.errors import TenantBusy
from fader_server.tenants import Tenant

Clock = Callable[[], float]


class Bucket:
    """`amount` a minute, and at most so much at once. One that asks for more waits for all of it,
    and those after it until that is paid for."""

    def __init__(self, amount: int, clock: Clock) -> None:
        self._amount = float(amount)
        self._level = self._amount
        self._clock = clock
        self._at = clock()

    def take(self, count: int) -> float:
        """Seconds to wait; 0.0: taken."""
        now = self._clock()
        self._fill((now - self._at) * self._amount / 60)
        self._at = now
        short = min(count, self._amount) - self._level
        if short > 0:
            return short * 60 / self._amount
        self._level -= count
        return 0.0

    def give_back(self, count: int) -> None:
        self._fill(count)

    def _fill(self, count: float) -> None:
        self._level = min(self._amount, self._level + count)


class Counted:
    """A call that was admitted."""

    def __init__(self, calls: Bucket | None, tokens: Bucket | None, count: int) -> None:
        self._calls = calls
        self._tokens = tokens
        self._count = count
        self._open = True

    def end(self, used: int) -> None:
        """It took so many tokens. The first end counts."""
        if self._open and self._tokens is not None:
            self._tokens.give_back(max(0, self._count - used))
        self._open = False

    def refused(self) -> None:
        """It never began."""
        if self._open and self._calls is not None:
            self._calls.give_back(1)
        self.end(0)


class Quotas:
    """The buckets of every tenant that has a limit. Used on the event loop only."""

    def __init__(self, tenants: Iterable[Tenant], clock: Clock = time.monotonic) -> None:
        self._calls: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}
        for tenant in tenants:
            if tenant.requests_per_minute is not None:
                self._calls[tenant.name] = Bucket(tenant.requests_per_minute, clock)
            if tenant.tokens_per_minute is not None:
                self._tokens[tenant.name] = Bucket(tenant.tokens_per_minute, clock)

    def admit(self, tenant: str, tokens: int) -> Counted:
        """Count a call of `tokens` at most. Raises TenantBusy; then nothing is counted."""
        calls, bucket = self._calls.get(tenant), self._tokens.get(tenant)
        with ExitStack() as undo:
            for limit, what, count in ((calls, "requests", 1), (bucket, "tokens", tokens)):
                if limit is None:
                    continue
                wait = limit.take(count)
                if wait:
                    raise TenantBusy(
                        f"The {what} of this minute are used up: try again later",
                        retry_after=math.ceil(wait),
                    )
                undo.callback(limit.give_back, count)
            undo.pop_all()
        return Counted(calls, bucket, tokens)
