"""Records one forward as a list of calls on tensors: native ones, torch operators, opaque modules.

Knows operators and storages; how a record is run again is replay.py's business.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fader_adapters.kernels.native import Call, Kind, Tape

UNREPEATABLE = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
)
"""Operators whose result depends on more than their inputs' addresses and shapes."""

READERS = ("tolist", "numpy", "__array__", "__dlpack__")
"""Methods of tensors that hand their values out without an operator."""

_guarding = threading.RLock()
"""One recording at a time guards those: what each leaves is what it found."""

PURE = frozenset({Kind.NORM, Kind.GATED_NORM, Kind.GATHER, Kind.MAP})
"""Native calls that read their arguments and write their result."""

UNFILLED = frozenset({"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty"})
"""Operators that give memory and no values."""


class Unrepeatable(Exception):
    """What ran cannot be recorded; the message says why."""


@dataclass(frozen=True, slots=True)
class TorchCall:
    """One call of a torch operator or an opaque function: out = function(*args, **kwargs)."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    in_place: bool
    """Its result is one of its arguments, changed."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        return tensors_of((self.args, self.kwargs, self.out))


@dataclass(frozen=True, slots=True)
class Recording:
    """Calls in order, and where their tensors came from."""

    calls: tuple[Call | TorchCall, ...]
    made: dict[int, int]
    """Storages that the forward itself allocated: address → bytes. All others are its inputs."""
    result: torch.Tensor


def tensors_of(tree: object) -> list[torch.Tensor]:
    """Every tensor in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def address(tensor: torch.Tensor) -> int:
    """What tells storages apart."""
    return tensor.untyped_storage().data_ptr()


def make_opaque(module: nn.Module, tape: Tape) -> None:
    """Have a module that may choose its way by its inputs' values recorded as one call, always run.

    Rotary embeddings of some families are of that kind: they rescale past a length.
    """
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  the module's own signature
        if tape.whole is None:
            return inner(*args, **kwargs)
        return tape.whole(inner, args, kwargs)

    module.forward = forward


class Recorder(TorchDispatchMode):
    """Listens to torch and to the native kernels' tape at once."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape
        self._calls: list[Call | TorchCall] = []
        self._made: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []  # an address stands for one storage while this lasts
        self._paused = False

    def record(self, forward: Callable[[], torch.Tensor]) -> Recording:
        """Run `forward` and write it down. Raises Unrepeatable; then its result is lost."""
        self._tape.listener, self._tape.whole = self.heard_native, self._run_whole
        try:
            with self, self._unread():
                result = forward()
        finally:
            self._tape.listener = self._tape.whole = None
        return Recording(tuple(self._needed(result))[::-1], self._made, result)

    def _needed(self, result: torch.Tensor) -> Iterator[Call | TorchCall]:
        """The calls that change anything, or give what a later one of them reads; from the last on.

        A layer may compute from its weights what its kernels took at its first call.
        """
        read = {address(result)}
        for call in reversed(self._calls):
            made = _only_made(call)
            if made is None or any(
                address(t) in read or address(t) not in self._made for t in made
            ):
                read.update(address(t) for t in call.tensors)
                yield call

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside is not written down."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @contextmanager
    def _unread(self) -> Iterator[None]:
        """No value of a tensor leaves it on this thread: what followed from it would be what was
        true of this one forward."""
        here = threading.get_ident()

        def guarded(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
            def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
                if threading.get_ident() == here and not self._paused:
                    raise Unrepeatable(f"Tensor.{name} reads values")
                return inner(tensor, *args, **kwargs)

            return read

        with _guarding:
            before = {name: vars(torch.Tensor).get(name) for name in READERS}
            for name in READERS:
                setattr(torch.Tensor, name, guarded(name, getattr(torch.Tensor, name)))
            try:
                yield
            finally:
                for name, own in before.items():
                    if own is None:
                        delattr(torch.Tensor, name)  # torch's own, of the class above
                    else:
                        setattr(torch.Tensor, name, own)

    def _run_whole(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:  # noqa: ANN401  the function's own
        """What returns nothing has changed an argument."""
        with self.paused():
            out = function(*args, **kwargs)
        self.heard_torch(function, args, kwargs, out, in_place=out is None)
        return out

    def heard_native(self, call: Call) -> None:
        """A native kernel ran."""
        self._alive += call.tensors
        self._calls.append(call)

    def heard_torch(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: object,
        *,
        in_place: bool,
    ) -> None:
        """An operator or an opaque module ran."""
        given = {address(t) for t in tensors_of((args, kwargs))}
        for tensor in tensors_of(out):
            if address(tensor) not in given:
                self._made[address(tensor)] = tensor.untyped_storage().nbytes()
        call = TorchCall(function, args, kwargs, out, in_place)
        self._alive += call.tensors
        self._calls.append(call)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._paused:
            return out
        outputs = tensors_of(out)
        self._alive += [*tensors_of((args, kwargs)), *outputs]
        inputs = {address(t) for t in tensors_of((args, kwargs))}
        fresh = [t for t in outputs if address(t) not in inputs]
        mutable = func._schema.is_mutable
        if outputs and not mutable and not fresh:
            return out  # a view
        if any(tag in func.tags for tag in UNREPEATABLE) and not _picks_by_number(func, args):
            raise Unrepeatable(f"{func} depends on values")
        if mutable and fresh:
            raise Unrepeatable(f"{func} changes an argument and makes a tensor")
        if func._schema.name in UNFILLED:
            self._made.update({address(t): t.untyped_storage().nbytes() for t in fresh})
            return out
        self.heard_torch(func, args, kwargs, out, in_place=mutable)
        return out


def _only_made(call: Call | TorchCall) -> list[torch.Tensor] | None:
    """What a call gives, where it does nothing else; None where it may."""
    if isinstance(call, Call):
        return [call.out] if call.op.kind in PURE and call.out is not None else None
    pure = isinstance(call.function, OpOverload) and not call.in_place
    return tensors_of(call.out) if pure else None


def _picks_by_number(func: OpOverload, args: tuple[Any, ...]) -> bool:
    """Indexing has a shape of its own only with masks."""
    return func._schema.name == "aten::index" and not any(
        t.dtype in (torch.bool, torch.uint8) for t in tensors_of(args[1])
    )
