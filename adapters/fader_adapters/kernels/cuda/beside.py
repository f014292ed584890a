"""A second stream beside the one a graph is captured on. Knows streams, not kernels."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Beside:
    """Work that runs while other work does, in a captured graph; elsewhere one after the other.

    There the host would spend more on the two streams than the device gains.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Launches inside wait for what was launched before, and for nothing launched after; they
        must not allocate. `join` comes before anything that reads what they write.
        """
        stream = self._apart()
        if stream is None:
            yield
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """Let the current stream wait for it."""
        stream = self._apart()
        if stream is not None:
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    def _apart(self) -> torch.cuda.Stream | None:
        capturing = self._stream is not None and torch.cuda.is_current_stream_capturing()
        return self._stream if capturing else None
