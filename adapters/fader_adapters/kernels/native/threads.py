"""How many threads the kernels share their work with. Like torch's own count, one a process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_chosen: list[int] = []
_here = threading.local()


def threads() -> int:
    """The number set here, else torch's; 1 on a thread that works alone."""
    if getattr(_here, "alone", False):
        return 1
    return _chosen[0] if _chosen else torch.get_num_threads()


def set_threads(count: int | None) -> None:
    """Use `count` threads from now on; None follows torch again.

    Two pools that spin on one machine's cores take them from each other: who raises this number
    should set torch's to 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"count must be a positive int or None, got {count}")
    _chosen[:] = [] if count is None else [count]


@contextmanager
def alone() -> Iterator[None]:
    """Kernels called inside, by this thread, run on it alone and leave the others' team to them."""
    before = getattr(_here, "alone", False)
    _here.alone = True
    try:
        yield
    finally:
        _here.alone = before
