"""One operator of torch on the pretended device: checked, ordered, computed on the CPU, wrapped."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.support.pretend_cuda import operators as ops
from tests.support.pretend_cuda.tensor import Pretend

if TYPE_CHECKING:
    from tests.support.pretend_cuda.device import PretendDevice


class DeviceMode(TorchDispatchMode):
    """Shows a device every operator of one thread."""

    def __init__(self, owner: "PretendDevice") -> None:
        super().__init__()
        self._owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = ops.name_of(func)
        if name in ("pin_memory", "_pin_memory"):
            return self._owner.host.allocate(args[0], filled=True)
        if name == "is_pinned":
            return self._owner.host.holds(args[0])
        if name == "_has_compatible_shallow_copy_type":
            return isinstance(args[0], Pretend) == isinstance(args[1], Pretend)
        if func._can_decompose():
            with DeviceMode(self._owner):
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        with self._owner.lock:
            return _Call(self._owner, func, name, args, dict(kwargs))()


class _Call:
    """One operator that is not made of others."""

    def __init__(
        self, owner: "PretendDevice", func: Any, name: str, args: tuple[Any, ...], kwargs: dict
    ) -> None:
        self.owner, self.func, self.name = owner, func, name
        self.args, self.kwargs = args, kwargs
        self.inputs = list(ops.tensors_in(args, kwargs))
        self.ours = [t for t in self.inputs if isinstance(t, Pretend)]
        self.targets = ops.written(func, args, kwargs)

    def __call__(self) -> Any:
        where = self.kwargs.get("device")
        device = None if where is None else torch.device(where)
        if self.name in ("copy_", "_to_copy") and self._crosses(device):
            return self._copy(device)
        for tensor in self.inputs:
            if not isinstance(tensor, Pretend):
                self.owner.host.reads(tensor, self.name)
        if not self.ours and (device is None or device.type != "cuda"):
            return self._on_host()
        self.owner.check()
        if ops.mismatched(self.name, self.args, self.kwargs):
            raise self.owner.notices.error(ops.MISMATCH.format(name=self.name))
        if self.ours and ops.makes_wait(self.name, self.args, self.kwargs):
            self.owner.wait_for_stream(self.name)
        if device is not None:
            self.kwargs["device"] = torch.device("cpu")
        self.kwargs.pop("pin_memory", None)
        return self._on_device()

    def _on_host(self) -> Any:
        if self.kwargs.pop("pin_memory", None):
            made = self.func(*self.args, **self.kwargs)
            return self.owner.host.allocate(made, filled=self.name not in ops.EMPTY)
        return self.func(*self.args, **self.kwargs)

    def _on_device(self) -> Any:
        owner = self.owner
        args, kwargs = tree_map_only(Pretend, lambda t: t.elem, (self.args, self.kwargs))
        if self.name == "histc":  # a GPU's counts integers, too
            dtype = args[0].dtype
            self.func = lambda x, *rest, **more: torch.histc(x.float(), *rest, **more).to(dtype)
        targets = self.targets
        known = {t.elem.untyped_storage().data_ptr() for t in self.ours}
        capture = owner.current.capture
        outside = [
            t for t in targets if isinstance(t, Pretend) and t.home.capture is not owner.graph
        ]
        unrun = capture is not None and outside  # a capture changes nothing
        result = self._unrun() if unrun else self.func(*args, **kwargs)
        fresh = [
            t for t in ops.tensors_in(result)
            if t.untyped_storage().data_ptr() not in known or not t.numel()
        ]  # fmt: skip
        if self.name in ops.EMPTY:
            for elem in fresh:
                poison(elem)
        wrapped = self._wrapped(result)
        if not targets and not fresh and list(ops.tensors_in(result)):
            return wrapped  # a view: nothing is read
        self._noted(args, kwargs, targets, fresh, capture)
        return wrapped

    def _unrun(self) -> Any:
        targets = [t.elem for t in self.targets]  # pyright: ignore
        count = len(self.func._schema.returns)
        return None if not count else targets[0] if count == 1 else tuple(targets)

    def _noted(
        self, args: Any, kwargs: Any, targets: list, fresh: list[torch.Tensor], capture: Any
    ) -> None:
        """Order this work, or note it in the graph that is captured."""
        owner, name, func = self.owner, self.name, self.func
        made = ops.EMPTY.__contains__(name)
        written = [t.elem for t in targets if isinstance(t, Pretend)] + fresh
        given = [t.elem for t in self.ours if all(t is not target for target in targets)]
        read, wrote = ([], []) if made else (given, written)

        def order() -> None:
            owner.touch(name, read, wrote)

        if capture is None:
            order()
            return

        def again() -> None:
            order()
            if made:
                for elem in fresh:
                    poison(elem)
                return
            result = func(*args, **kwargs)
            if not targets:
                for old, new in zip(fresh, ops.tensors_in(result), strict=True):
                    old.copy_(new)

        owner.clocks.work(owner.current.number)
        capture.note(name, again, [t.home for t in self.ours])
        owner.graph.made += fresh  # pyright: ignore

    def _wrapped(self, result: Any) -> Any:
        same = {id(t.elem): t for t in self.ours}

        def wrap(elem: torch.Tensor) -> torch.Tensor:
            found = same.get(id(elem))
            return self.owner.wrap(elem) if found is None else found

        return tree_map_only(torch.Tensor, wrap, result)

    def _crosses(self, device: torch.device | None) -> bool:
        """Whether the copy is between host and device."""
        if self.name == "copy_":
            return isinstance(self.args[0], Pretend) != isinstance(self.args[1], Pretend)
        if device is None:
            return False
        return isinstance(self.args[0], Pretend) != (device.type == "cuda")

    def _copy(self, device: torch.device | None) -> torch.Tensor:
        """Between host and device, into a tensor that is there or a new one."""
        if device is None:
            target, source = self.args[:2]
            unwaited = self.kwargs.get("non_blocking", len(self.args) > 2 and self.args[2])
        else:
            source, unwaited = self.args[0], self.kwargs.pop("non_blocking", False)
            self.kwargs["device"] = torch.device("cpu")
            self.kwargs.pop("pin_memory", None)
            target = None
        if isinstance(source, Pretend):
            return self._to_host(source, target, unwaited=unwaited)
        return self._to_device(source, target, unwaited=unwaited)

    def _to_host(
        self, source: Pretend, target: torch.Tensor | None, *, unwaited: bool
    ) -> torch.Tensor:
        owner = self.owner
        if target is None:
            target = self.func(source.elem, **self.kwargs)
            if unwaited:
                target = owner.host.allocate(target, filled=False)
        later = unwaited and owner.host.holds(target)
        if later and owner.current.capture is not None:
            raise RuntimeError("copies to the host inside of a graph are not modelled")
        if not later:
            owner.wait_for_stream("copy to the host")
        stamp = owner.touch("copy to the host", [source.elem], [])
        if later:
            owner.host.copy_in(target, source.elem.expand_as(target), stamp)
        else:
            owner.host.reads(target, "copy to the host")
            target.copy_(source.elem)
        return target

    def _to_device(
        self, source: torch.Tensor, target: Pretend | None, *, unwaited: bool
    ) -> torch.Tensor:
        owner = self.owner
        owner.host.reads(source, "copy to the device")
        pinned = owner.host.holds(source)
        single = source.dim() == 0 and target is not None  # torch hands one number to a kernel
        waits = not single and not (pinned and unwaited)
        if waits:
            owner.wait_for_stream(
                "copy from pinned memory" if pinned else "copy of pageable memory"
            )
        if target is None:
            target = owner.wrap(self.func(source, **self.kwargs))
            fill: Callable[[], Any] | None = None
        else:
            fill = partial(target.elem.copy_, source)
        self._arrive(source, target, fill, pinned=pinned and not waits)
        return target

    def _arrive(
        self, source: torch.Tensor, target: Pretend, fill: Callable[[], Any] | None, *, pinned: bool
    ) -> None:
        owner, elem = self.owner, target.elem

        def order() -> None:
            stamp = owner.touch("copy to the device", [], [elem])
            if pinned:
                owner.host.copy_out(source, stamp)

        capture = owner.current.capture
        if capture is None:
            order()
            if fill is not None:
                fill()
            return
        refill = fill or partial(elem.copy_, source)

        def again() -> None:
            order()
            refill()

        owner.clocks.work(owner.current.number)
        capture.note("copy to the device", again, [target.home])


def poison(elem: torch.Tensor) -> None:
    """Values that show where they are used."""
    if elem.is_floating_point():
        elem.fill_(float("nan"))
    elif elem.numel():
        elem.untyped_storage().fill_(0x5A)
