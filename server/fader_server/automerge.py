"""Carries out what the policy of `--merge auto` decides, on the event loop, and tells of it."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from fader_adapters.errors import AdapterError
from fader_server.api.adapter_ports import Adapters, LeasedTerm
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.api.merge_ports import MergeOrder, Merging
from fader_server.api.traffic import BlendKey, Traffic, blend_key
from fader_server.errors import FaderError
from fader_server.mergepolicy import Decision, Policy

_log = logging.getLogger(__name__)
_TICKS = 10
"""Looks at the traffic in one window of the policy, at most one a second."""


class AutoMerge:
    """Looks at the traffic now and then; `look` is one look."""

    def __init__(
        self,
        merging: Merging,
        adapters: Adapters,
        traffic: Traffic,
        policy: Policy,
        *,
        order: MergeOrder,
        decided: Callable[[str], None] = lambda action: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._merging = merging
        self._adapters = adapters
        self._traffic = traffic
        self._policy = policy
        self._order = order
        self._decided = decided
        self._clock = clock
        self._asked: BlendKey | None = None

    async def run(self, seconds: float) -> None:
        """Until it is cancelled; `seconds`: the policy's window."""
        while True:
            await asyncio.sleep(max(1.0, seconds / _TICKS))
            await self.look()

    async def look(self) -> None:
        """Take the traffic since the last look in and act on it."""
        tokens, terms = self._traffic.take()
        status, now = self._merging.status(), self._clock()
        if self._asked is not None and not status.busy:
            if status.job is not None:  # it came to nothing, and the log says why
                self._policy.shun(self._asked, now)
            self._asked = None
        merged = None if status.lane is None else blend_key(status.lane.terms)
        decision = self._policy.observe(now, tokens, self._asked or merged)
        if decision is None or status.busy:
            return
        try:
            await self._act(decision, terms.get(decision.blend))
        except (FaderError, AdapterError) as error:
            self._policy.shun(decision.blend, now)
            _log.warning("auto merge", extra={"fields": _told(decision) | {"failed": str(error)}})

    async def _act(self, decision: Decision, terms: Sequence[LeasedTerm] | None) -> None:
        if decision.action == "merge":
            if terms is None:  # none of its tokens came since the last look: at the next, then
                return
            named = [NamedTerm(AdapterRef(t.name, t.version), t.weight) for t in terms]
            await self._merging.start(self._order, self._adapters.acquire(named))
            self._asked = decision.blend
        else:
            await self._merging.drop()
        self._decided(decision.action)
        _log.info("auto merge", extra={"fields": _told(decision)})


def _told(decision: Decision) -> dict[str, object]:
    return {
        "decision": decision.action,
        "blend": [f"{version[:12]}={weight:g}" for version, weight in decision.blend],
        "share": round(decision.share, 3),
        "tokens": decision.tokens,
    }
