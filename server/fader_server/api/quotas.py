"""What a tenant may ask for in a minute: calls and tokens, each in a bucket that fills evenly.

A call is counted when it is admitted, with every token that it may come to; what it did not need is
given back at its end, and all of it when the engine refuses it.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

from fader_server.errors import TenantBusy
from fader_server.tenants import Tenant

Clock = Callable[[], float]


class Bucket:
    """`amount` a minute, and at most so much at once. One that asks for more waits for all of it,
    and those after it until that is paid for."""

    def __init__(self, amount: int, clock: Clock) -> None:
        self.amount = amount
        self._level = float(amount)
        self._clock = clock
        self._at = clock()

    def take(self, count: int) -> float:
        """Seconds to wait; 0.0: taken."""
        self._refill()
        short = min(count, self.amount) - self._level
        if short > 0:
            return short * 60 / self.amount
        self._level -= count
        return 0.0

    def give_back(self, count: int) -> None:
        self._fill(count)

    def look(self) -> tuple[int, float]:
        """How much is left, and the seconds until all of it is."""
        self._refill()
        return max(0, int(self._level)), (self.amount - self._level) * 60 / self.amount

    def _refill(self) -> None:
        now = self._clock()
        self._fill((now - self._at) * self.amount / 60)
        self._at = now

    def _fill(self, count: float) -> None:
        self._level = min(self.amount, self._level + count)


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
        self._clock = clock
        self._calls: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}
        self.replace(tenants)

    def replace(self, tenants: Iterable[Tenant]) -> None:
        """Other tenants, or limits; a limit that stays is as used up as it was."""
        limits = [(t.name, t.requests_per_minute, t.tokens_per_minute) for t in tenants]
        self._calls = self._buckets(self._calls, {name: calls for name, calls, _ in limits})
        self._tokens = self._buckets(self._tokens, {name: tokens for name, _, tokens in limits})

    def _buckets(
        self, before: Mapping[str, Bucket], limits: Mapping[str, int | None]
    ) -> dict[str, Bucket]:
        found: dict[str, Bucket] = {}
        for name, amount in limits.items():
            if amount is not None:
                same = name in before and before[name].amount == amount
                found[name] = before[name] if same else Bucket(amount, self._clock)
        return found

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

    def headers(self, tenant: str) -> dict[str, str]:
        """What is left to a tenant now, in OpenAI's headers; none without a limit."""
        told: dict[str, str] = {}
        for what, buckets in (("requests", self._calls), ("tokens", self._tokens)):
            if tenant in buckets:
                left, seconds = buckets[tenant].look()
                told[f"x-ratelimit-limit-{what}"] = str(buckets[tenant].amount)
                told[f"x-ratelimit-remaining-{what}"] = str(left)
                told[f"x-ratelimit-reset-{what}"] = _duration(seconds)
        return told


def _duration(seconds: float) -> str:
    """As Go writes it and clients of OpenAI read it: 0s, 20ms, 1.5s, 2m0s."""
    milliseconds = math.ceil(seconds * 1000)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"
