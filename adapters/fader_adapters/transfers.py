"""Copies of adapters into a device's arena, and when they have arrived. Knows no versions.

A copy waits for the kernels that were queued before it, which may read what lay there; nothing
waits for the copy unless it is told to.
"""

from typing import Protocol, cast

import torch


class Ticket(Protocol):
    """One copy under way."""

    def done(self) -> bool:
        """Whether the bytes are there; never waits."""
        ...

    def join(self) -> None:
        """Let the current stream wait for the copy; the caller goes on."""
        ...

    def wait(self) -> None:
        """Return once the copy has ended: its source may be given away."""
        ...


class Transfers(Protocol):
    """Copies host tensors to a device, in order. Owned by the engine thread."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Ticket:
        """Begin copying source to target, both 1-D of one size; keep both until it has ended."""
        ...


class _Arrived:
    def done(self) -> bool:
        return True

    def join(self) -> None:
        pass

    def wait(self) -> None:
        pass


ARRIVED = _Arrived()
"""The ticket of a copy that has ended."""


class CopyNow:
    """Copies at once, in order on the current stream: for memory that the host shares."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Ticket:
        target.copy_(source)
        return ARRIVED


class SideStream:
    """One asynchronous copy an adapter on a stream beside the engine's; sources are pinned."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Ticket:
        self._stream.wait_stream(torch.cuda.current_stream(target.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return _Event(cast("torch.cuda.Event", self._stream.record_event()))


class _Event:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def done(self) -> bool:
        return self._event.query()

    def join(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)

    def wait(self) -> None:
        self._event.synchronize()


def transfers_to(device: torch.device) -> Transfers:
    """A side stream on a GPU, plain copies elsewhere."""
    return SideStream(device) if device.type == "cuda" else CopyNow()
