"""Which modules' own code calls which of torch's operators: heard in one forward.

Knows module trees and names of operators; what follows from a call others know.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True, slots=True)
class Heard:
    """A call on rows of tokens."""

    name: str
    """Of the operator, without its namespace."""
    dtype: torch.dtype
    """Of its first argument."""


class Callers(TorchDispatchMode):
    """Of one model, by the innermost module that was running."""

    def __init__(self, model: nn.Module, *, but: Iterable[nn.Module] = ()) -> None:
        """but: modules whose calls, and those of modules inside them, are nobody's."""
        super().__init__()
        self.calls: dict[nn.Module, set[Heard]] = {}
        self._model = model
        self._but = frozenset(but)
        self._running: list[nn.Module] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear what runs inside."""
        within = {m for module in self._but for m in module.modules() if m is not module}
        handles = [
            handle
            for module in self._model.modules()
            if module not in within  # whose order, side by side, says nothing
            for handle in (
                module.register_forward_pre_hook(self._begins),
                module.register_forward_hook(self._ends),
            )
        ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._running.clear()

    def _begins(self, module: nn.Module, args: object) -> None:
        self._running.append(module)

    def _ends(self, module: nn.Module, args: object, result: object) -> None:
        self._running.pop()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        x = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
        if x is not None and x.dim() > 1 and self._running and self._running[-1] not in self._but:
            heard = Heard(func._schema.name.rpartition("::")[2], x.dtype)
            self.calls.setdefault(self._running[-1], set()).add(heard)
        return func(*args, **(kwargs or {}))
