"""What stands for torch.cuda's streams and events."""

import threading
from typing import TYPE_CHECKING, Any

import torch

from tests.support.pretend_cuda.clocks import Mark
from tests.support.pretend_cuda.faults import CAPTURING

if TYPE_CHECKING:
    from tests.support.pretend_cuda.device import PretendDevice
    from tests.support.pretend_cuda.graphs import Capture


class Stream:
    """Work in order; all threads begin on the device's default one."""

    def __init__(self, owner: "PretendDevice", number: int) -> None:
        self.owner, self.number = owner, number
        self.device = torch.device("cuda", 0)
        self.capture: Capture | None = None

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event(self.owner)
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        if event.mark is None:
            return
        if self.capture is None and event.capture is not None and event.capture.open:
            event.capture.join(self)
        elif self.capture is not None and event.capture is not self.capture:
            raise RuntimeError(
                "CUDA error: dependency created on uncaptured work in another stream\n"
                "Search for `cudaErrorStreamCaptureIsolation' in the documentation"
            )
        with self.owner.lock:
            self.owner.clocks.wait(self.number, event.mark)

    def synchronize(self) -> None:
        self.owner.forbid_in_capture("cudaStreamSynchronize")
        self.owner.wait("stream", self.owner.clocks.mark(self.number))

    def query(self) -> bool:
        self.owner.forbid_in_capture("cudaStreamQuery")
        clocks = self.owner.clocks
        return clocks.done(self.number, clocks.last(self.number))


class Event:
    """A point on a stream. The host is told late that it came: see PretendDevice.patience."""

    def __init__(self, owner: "PretendDevice") -> None:
        self._owner = owner
        self.mark: Mark | None = None
        self.capture: Capture | None = None
        self._asked = 0

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self._owner.current
        self.capture = stream.capture
        with self._owner.lock:
            self.mark = self._owner.clocks.mark(stream.number)
        self._asked = 0

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._owner.current).wait_event(self)

    def synchronize(self) -> None:
        self._usable("cudaEventSynchronize")
        if self.mark is not None:
            self._owner.wait("event", self.mark)

    def query(self) -> bool:
        self._usable("cudaEventQuery")
        if self.mark is None:
            return True
        self._asked += 1
        if self._asked <= self._owner.patience:
            return False
        self._owner.saw(self.mark)
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds, of which there are none here."""
        assert self.mark is not None
        assert end.mark is not None
        return 1.0

    def _usable(self, what: str) -> None:
        self._owner.forbid_in_capture(what)
        if self.capture is not None:
            raise RuntimeError(CAPTURING.format(what=f"{what} of an event that was captured"))


class Current(threading.local):
    """What each thread works on."""

    def __init__(self, default: Stream) -> None:
        self.stream = default
        self.capture: Capture | None = None
        """What this thread captures."""


class OnStream:
    """`with torch.cuda.stream(...)`."""

    def __init__(self, current: Current, stream: Stream | None) -> None:
        self._current, self._stream = current, stream

    def __enter__(self) -> None:
        self._before = self._current.stream
        self._current.stream = self._stream or self._before

    def __exit__(self, *_: Any) -> None:
        self._current.stream = self._before
