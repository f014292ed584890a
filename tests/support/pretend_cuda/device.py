"""The pretended device: its clocks, memory, streams and waits, and how it gets under torch."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo  # looks at some of the functions that are replaced here when it is imported
from torch.utils._python_dispatch import _disable_current_modes

from tests.support.pretend_cuda import guard
from tests.support.pretend_cuda.clocks import Clocks, Mark
from tests.support.pretend_cuda.dispatch import DeviceMode
from tests.support.pretend_cuda.faults import Notices, PretendFault
from tests.support.pretend_cuda.graphs import Graph, Recording
from tests.support.pretend_cuda.host import Host
from tests.support.pretend_cuda.memory import Memory, span
from tests.support.pretend_cuda.streams import Current, Event, OnStream, Stream
from tests.support.pretend_cuda.tensor import Pretend


class PretendDevice:
    """One device with one default stream.

    patience  how often an event that has come is denied when the host asks for it
    total     bytes of its memory
    """

    def __init__(self, *, patience: int = 1, total: int = 4 << 30) -> None:
        self.patience, self.total = patience, total
        self.lock = threading.RLock()
        self.clocks, self.notices = Clocks(), Notices()
        self.memory = Memory(self.clocks, self.notices)
        self.host = Host(self.clocks, self.notices)
        self.waits: Counter[str] = Counter()
        """How often the host waited for the device, by what it called."""
        self.replays = self.captures = 0
        self.sync_mode = 0
        """Of torch's modes for operators that let the host wait: 2 refuses them."""
        self.default = self.new_stream()
        self.own = Current(self.default)
        self._launches: Any = None

    @property
    def current(self) -> Stream:
        """The calling thread's stream."""
        return self.own.stream

    @property
    def graph(self) -> object:
        """What the calling thread captures."""
        capture = self.current.capture
        return None if capture is None else capture._graph

    @property
    def kernels(self) -> set[str]:
        """Names of the Triton kernels that ran."""
        return self._launches.names

    def new_stream(self, *_: object, **__: object) -> Stream:
        with self.lock:
            return Stream(self, self.clocks.new())

    def wrap(self, elem: torch.Tensor) -> Pretend:
        """A CPU tensor as the device's, of the memory it stands on."""
        home = self.memory.of(elem, owner=self.current.number, capture=self.graph)
        return Pretend(elem, home)

    def touch(
        self, name: str, reads: list[torch.Tensor], writes: list[torch.Tensor]
    ) -> tuple[int, int]:
        """One work on the current stream: its stamp. Raises PretendFault."""
        stream = self.current.number
        stamp = (stream, self.clocks.work(stream))
        for elems, write in ((reads, False), (writes, True)):
            for elem in elems:
                home = self.memory.at(elem.untyped_storage().data_ptr())
                if home is not None and elem.numel():
                    self.memory.touch(home, span(elem), work=stamp, write=write, name=name)
        return stamp

    def wait(self, what: str, mark: Mark) -> None:
        """The host waits for an event and sees all that came before it. Raises PretendFault."""
        self.waits[what] += 1
        self.saw(mark)

    def saw(self, mark: Mark) -> None:
        """The host knows that an event has come."""
        with self.lock, self.plainly():
            self.clocks.saw(mark)
            self.host.settle()

    def wait_for_stream(self, what: str) -> None:
        """An operator lets the host wait for all that its stream holds."""
        capture = self.current.capture
        if capture is not None:
            raise capture.spoilt(what)
        if self.sync_mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        self.wait(what, self.clocks.mark(self.current.number))

    def synchronize(self, *_: object) -> None:
        self.forbid_in_capture("cudaDeviceSynchronize")
        self.wait("device", self.clocks.everything())
        self.check()

    def forbid_in_capture(self, what: str) -> None:
        """Raise RuntimeError where this thread captures."""
        if self.own.capture is not None:
            raise self.own.capture.spoilt(what)

    def set_sync_mode(self, mode: int | str) -> None:
        self.sync_mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)

    def check(self) -> None:
        """Raise PretendFault for what nobody could be told at once."""
        self.memory.check()
        self.host.check()

    def plainly(self) -> Any:
        """`with`: operators of this thread are the CPU's own."""
        return _disable_current_modes()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Stand under torch on every thread that starts from now on."""
        from tests.support.pretend_cuda.kernels import Launches  # imports triton

        self._launches = Launches(self)
        self._launches.install(patch)
        device, cuda = self, torch.cuda
        run = threading.Thread.run

        def shown(thread: threading.Thread) -> None:
            with _seen_by(device):
                run(thread)

        patch.setattr(threading.Thread, "run", shown)
        for name, stand_in in {
            "Stream": self.new_stream,
            "Event": lambda *_, **__: Event(device),
            "CUDAGraph": lambda *_, **__: Graph(device),
            "graph": partial(Recording, self),
            "stream": lambda stream: OnStream(device.own, stream),
            "current_stream": lambda *_: device.current,
            "synchronize": self.synchronize,
            "set_sync_debug_mode": self.set_sync_mode,
            "get_sync_debug_mode": lambda: self.sync_mode,
            "is_current_stream_capturing": lambda: device.current.capture is not None,
            "mem_get_info": lambda *_: (max(0, device.total - device.memory.nbytes), device.total),
            "get_device_capability": lambda *_: (8, 0),
            "get_device_name": lambda *_: "a pretended device",
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "empty_cache": lambda: None,
            "memory_snapshot": list,
            "cudart": self.host.cudart,
            "_lazy_init": lambda: None,
        }.items():
            patch.setattr(cuda, name, stand_in)
        patch.setattr(torch.version, "cuda", "0.0")
        alike = torch._has_compatible_shallow_copy_type
        patch.setattr(
            torch,
            "_has_compatible_shallow_copy_type",
            lambda a, b: isinstance(a, Pretend) == isinstance(b, Pretend) and alike(a, b),
        )
        for name in ("tolist", "numpy"):
            patch.setattr(torch.Tensor, name, self._reading(name), raising=False)

    def _reading(self, name: str) -> Any:
        own = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if name == "tolist":
                self.host.reads(tensor, name)
            return own(tensor, *args, **kwargs)

        return read


def unavailable() -> str:
    """Why there can be no pretended device here; empty when there can."""
    return guard.obstacle()


@contextmanager
def pretend(**given: int) -> Iterator[PretendDevice]:
    """A device under torch, for this thread and those it starts.

    Raises PretendFault at the end for what was under way, or given back too early, and for what
    was noticed before; a test that plants a fault empties `notices.told`.
    """
    guard.register()
    device = PretendDevice(**given)
    with pytest.MonkeyPatch.context() as patch:
        device.install(patch)
        with _seen_by(device):
            yield device
        device.check()
        if device.notices.told:
            raise PretendFault(f"noticed on the way: {device.notices.told[0]}")


@contextmanager
def _seen_by(device: PretendDevice) -> Iterator[None]:
    """The device sees every operator of this thread. torch.tensor makes its tensor on the CPU and
    brings it over by one."""
    torch._C._set_only_lift_cpu_tensors(True)  # pyright: ignore
    try:
        with DeviceMode(device):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)  # pyright: ignore
