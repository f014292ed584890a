"""Triton launches on the pretended device: interpreted, every load and store looked at.

A launch touches exactly the bytes that its programs load and store; one outside of its arguments'
storages is an illegal access.
"""

import inspect
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

from tests.support.pretend_cuda.memory import Allocation, Range, merged
from tests.support.pretend_cuda.tensor import Pretend

if TYPE_CHECKING:
    import pytest

    from tests.support.pretend_cuda.device import PretendDevice

_KEPT = 512
"""Ranges of one storage that are kept apart while a launch runs."""


class Trace:
    """The bytes that one launch loads and stores."""

    def __init__(self, arguments: list[Range]) -> None:
        places = sorted(set(arguments))
        self._starts = np.array([start for start, _ in places], np.uint64)
        self._stops = np.array([stop for _, stop in places], np.uint64)
        self.seen: dict[tuple[int, bool], set[Range]] = {}
        """(start of the storage, whether written) → bytes"""

    def note(self, pointers: np.ndarray, mask: np.ndarray, size: int, *, write: bool) -> None:
        at = pointers.reshape(-1)[np.broadcast_to(mask, pointers.shape).reshape(-1).astype(bool)]
        if not at.size:
            return
        low, high = int(at.min()), int(at.max()) + size
        place = bisect_right(self._starts, low) - 1  # pyright: ignore
        if place < 0 or high > int(self._stops[place]):
            self._each(at, size, write=write)
            return
        self._add(place, (low, high), write=write)

    def _each(self, at: np.ndarray, size: int, *, write: bool) -> None:
        """Of several storages at once, or of none."""
        places = np.searchsorted(self._starts, at, side="right").astype(np.int64) - 1
        outside = (places < 0) | (at + np.uint64(size) > self._stops[places.clip(min=0)])
        if outside.any():
            verb = "store to" if write else "load from"
            raise RuntimeError(
                f"CUDA error: an illegal memory access was encountered ({verb} {outside.sum()} "
                f"places outside of every argument, the first at {int(at[outside][0]):#x})"
            )
        for place in np.unique(places):
            own = at[places == place]
            self._add(int(place), (int(own.min()), int(own.max()) + size), write=write)

    def _add(self, place: int, bytes_: Range, *, write: bool) -> None:
        seen = self.seen.setdefault((int(self._starts[place]), write), set())
        seen.add(bytes_)
        if len(seen) > _KEPT:
            kept = merged(seen)
            seen.clear()
            seen.update(kept)


class Launches:
    """Runs launches of one device."""

    def __init__(self, owner: "PretendDevice") -> None:
        self._owner = owner
        self._trace: Trace | None = None
        self.count = 0
        self.names: set[str] = set()

    def install(self, patch: "pytest.MonkeyPatch") -> None:
        """Let Triton's interpreter ask this device."""
        builder: Any = interpreter.InterpreterBuilder
        load, store, run = (
            builder.create_masked_load,
            builder.create_masked_store,
            InterpretedFunction.run,
        )

        def traced_load(own: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            if self._trace is not None:
                size = np.dtype(interpreter._get_np_dtype(ptrs.get_element_ty())).itemsize
                self._trace.note(ptrs.data, mask.data, size, write=False)
            return load(own, ptrs, mask, *rest)

        def traced_store(own: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            if self._trace is not None:
                size = np.dtype(interpreter._get_np_dtype(ptrs.get_element_ty())).itemsize
                self._trace.note(ptrs.data, mask.data, size, write=True)
            return store(own, ptrs, value, mask, *rest)

        def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            if not warmup:
                self._launch(kernel, run, args, kwargs, grid)

        patch.setattr(builder, "create_masked_load", traced_load)
        patch.setattr(builder, "create_masked_store", traced_store)
        patch.setattr(InterpretedFunction, "run", launch)

    def _launch(self, kernel: Any, run: Any, args: Any, kwargs: Any, grid: Any) -> None:
        owner, name = self._owner, kernel.fn.__name__
        owner.check()
        homes: dict[int, Allocation] = {}
        bound = inspect.signature(kernel.fn).bind(
            *args, **{k: v for k, v in kwargs.items() if k in kernel.arg_names}
        )
        for place, value in enumerate(bound.arguments.values()):
            if isinstance(value, Pretend):
                if value.numel():
                    homes[value.elem.untyped_storage().data_ptr()] = value.home
            elif isinstance(value, torch.Tensor):
                raise ValueError(
                    f"Pointer argument (at {place}) of {name} cannot be accessed from Triton "
                    "(cpu tensor?)"
                )
        plain = tuple(value.elem if isinstance(value, Pretend) else value for value in args)
        places = [span_of_storage(value) for value in plain if isinstance(value, torch.Tensor)]

        def again() -> None:
            self._run(name, places, lambda: run(kernel, *plain, grid=grid, warmup=False, **kwargs))

        capture = owner.current.capture
        with owner.lock, owner.plainly():
            if capture is not None:
                capture.note(name, again, list(homes.values()))
            else:
                again()

    def _run(self, name: str, places: list[Range], work: Any) -> None:
        owner = self._owner
        self.count += 1
        self.names.add(name)
        trace = self._trace = Trace([place for place in places if place[1] > place[0]])
        try:
            work()
        except interpreter.InterpreterError as error:
            if "illegal memory access" in str(error):
                raise owner.notices.error(f"{name}: {error}") from error
            raise
        finally:
            self._trace = None
        stream = owner.current.number
        stamp = (stream, owner.clocks.work(stream))
        for write in (False, True):
            for (start, wrote), ranges in trace.seen.items():
                home = owner.memory.at(start) if wrote == write else None
                for bytes_ in merged(ranges) if home is not None else ():
                    owner.memory.touch(home, bytes_, work=stamp, write=write, name=name)


def span_of_storage(tensor: torch.Tensor) -> Range:
    """All bytes of what a tensor stands on."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
