"""Work beside that of a GPU's other threads, on a stream of its own. Knows only streams."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Aside:
    """For the work of one thread at a time; on a CPU nothing changes.

    Threads begin on one stream, the device's default one: who waits there waits for all that the
    others have queued.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Work of the block comes after what the caller's stream holds now, beside what is queued
        there later, and has ended when the block does."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self._stream.synchronize()

    def reached(self) -> Callable[[], None]:
        """What waits, on any thread, until all has run that the caller's stream holds now: memory
        that was taken aside may be given back after that."""
        if self._stream is None:
            return lambda: None
        event = torch.cuda.Event()
        event.record()
        return event.synchronize
