"""How far a long job is. A type and its silent value."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done and how much there is."""


def silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""
