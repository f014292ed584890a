"""How long work lets others go first: what it calls between its pieces. Knows no clock."""

from collections.abc import Callable

Pause = Callable[[], None]
"""Called by the working thread after pieces of a millisecond or less where work may wait, longer
ones of weights on a GPU; may sleep, or raise to give up."""


def never() -> None:
    """For work that nobody waits beside."""
