"""Rows whose adapters are still on their way to the device sit a step out. Integers only."""

from collections.abc import Collection
from typing import Protocol

from fader_server.core import Plan
from fader_server.engine.isolation import without


class Copies(Protocol):
    """Copies of adapters to the device that were begun."""

    def late(self) -> Collection[int]:
        """Slots whose weights have not arrived yet; never waits."""
        ...

    def join(self) -> None:
        """Let the next step wait on the device for all of them."""
        ...


class AtOnce:
    """Copies that have ended when they were begun."""

    def late(self) -> Collection[int]:
        return ()

    def join(self) -> None:
        pass


def arrived(plan: Plan, copies: Copies) -> Plan:
    """The plan without the rows that would wait for a copy; the scheduler plans them again.

    Where every row would, the whole plan: there is nobody to keep waiting.
    """
    late = copies.late()
    if not late:
        return plan
    waiting = {
        index
        for index, terms in enumerate(plan.terms.rows)
        if any(slot in late for slot, _ in terms.terms)
    }
    present = without(plan, waiting)
    if present is None:
        copies.join()
        return plan
    return present
