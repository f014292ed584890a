"""What stands for CUDA graphs: operators and launches that are noted, and run again on replay.

A capture computes nothing that stays. A replay runs what was noted on the same memory with the same
numbers; Python in between does not run again.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tests.support.pretend_cuda.faults import CAPTURING
from tests.support.pretend_cuda.memory import Allocation
from tests.support.pretend_cuda.streams import OnStream, Stream

if TYPE_CHECKING:
    from tests.support.pretend_cuda.device import PretendDevice


@dataclass(frozen=True, slots=True)
class Node:
    """One operator or launch of a graph."""

    name: str
    run: Callable[[], None]
    """Does it again, on the current stream."""
    uses: tuple["weakref.ref[Allocation]", ...]
    """What it reads and writes that is not the graph's own memory."""
    stream: Stream | None
    """A fork that it runs on; None: the stream of the replay."""


class Capture:
    """What is noted while a stream captures."""

    def __init__(self, graph: "Graph", origin: Stream) -> None:
        self.open = True
        self._broken = False
        self._graph = graph
        self._streams = [origin]
        self._begun: dict[int, int] = {}
        origin.capture = self

    def join(self, stream: Stream) -> None:
        """Another stream waits for an event of this one: it is captured from now on."""
        self._streams.append(stream)
        self._begun[stream.number] = stream.owner.clocks.last(stream.number)
        stream.capture = self

    def note(self, name: str, run: Callable[[], None], uses: list[Allocation]) -> None:
        """Work of the calling thread's stream."""
        outside = tuple(weakref.ref(a) for a in uses if a.capture is not self._graph)
        stream = self._streams[0].owner.current
        self._graph.nodes.append(Node(name, run, outside, self._fork(stream)))

    def note_order(self, stream: Stream, run: Callable[[Stream], None]) -> None:
        """An event that is recorded or waited for on a stream."""
        owner, fork = stream.owner, self._fork(stream)
        self._graph.nodes.append(Node("event", lambda: run(owner.current), (), fork))

    def _fork(self, stream: Stream) -> Stream | None:
        return None if stream is self._streams[0] else stream

    def spoilt(self, what: str) -> RuntimeError:
        """What a call that no capture allows raises; the capture is of no use from then on."""
        self._broken = True
        return RuntimeError(CAPTURING.format(what=what))

    def end(self) -> None:
        """Raises RuntimeError where something was refused, or a fork was not joined."""
        self.open = False
        origin, *forks = self._streams
        for stream in self._streams:
            stream.capture = None
        if self._broken:
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture\n"
                "Search for `cudaErrorStreamCaptureInvalidated' in the documentation"
            )
        clocks = origin.owner.clocks
        for fork in forks:
            last = clocks.last(fork.number)
            joined = clocks.ordered(fork.number, last, origin.number)
            if last > self._begun[fork.number] and not joined:
                raise RuntimeError(
                    "CUDA error: capturing stream has unjoined work\n"
                    "Search for `cudaErrorStreamCaptureUnjoined' in the documentation"
                )


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, owner: "PretendDevice") -> None:
        self._owner = owner
        self.nodes: list[Node] = []
        self.made: list[torch.Tensor] = []
        """Values of its own memory, which a capture leaves undefined."""
        self.replays = 0

    def pool(self) -> object:
        return (0, 1)

    def replay(self) -> None:
        """Run all of it on the current stream. Raises PretendFault for memory that is gone."""
        owner = self._owner
        if owner.current.capture is not None:
            raise RuntimeError("a graph inside of a graph is not modelled")
        with owner.lock, owner.plainly(), torch.inference_mode():
            for node in self.nodes:
                if any(use() is None for use in node.uses):
                    raise owner.notices.fault(
                        f"{node.name} in a graph uses memory that was given back"
                    )
                with OnStream(owner.own, node.stream):
                    node.run()
        self.replays += 1
        owner.replays += 1


class Recording:
    """`with torch.cuda.graph(...)`. As torch's, it leaves the thread on the capture's stream where
    the capture cannot be ended."""

    def __init__(
        self,
        owner: "PretendDevice",
        graph: Graph,
        pool: object = None,
        stream: Stream | None = None,
        capture_error_mode: str = "global",
    ) -> None:
        self._owner, self._graph = owner, graph
        self._stream = stream or owner.new_stream()
        assert capture_error_mode in ("global", "thread_local", "relaxed")

    def __enter__(self) -> None:
        owner = self._owner
        owner.synchronize()
        self._on = OnStream(owner.own, self._stream)
        self._on.__enter__()
        owner.captures += 1
        owner.own.capture = self._capture = Capture(self._graph, self._stream)

    def __exit__(self, *_: Any) -> None:
        self._owner.own.capture = None
        self._capture.end()
        self._on.__exit__()
        for elem in self._graph.made:
            if elem.is_floating_point():
                with self._owner.plainly():
                    elem.fill_(float("nan"))
        self._graph.made.clear()
