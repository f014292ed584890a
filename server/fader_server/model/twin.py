"""A module's forward, its class's own code, where it calls other functions by the same names."""

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any

from torch import nn


def written(module: nn.Module) -> FunctionType | None:
    """The code of its class's forward, beneath decorators; None: it is not Python's."""
    found = inspect.unwrap(type(module).forward)
    return found if isinstance(found, FunctionType) else None


def calls(module: nn.Module, name: str) -> bool:
    """Whether that code names a function so."""
    own = written(module)
    return own is not None and name in own.__code__.co_names


def with_functions(
    module: nn.Module, functions: Mapping[str, Callable[..., Any]]
) -> MethodType | None:
    """The module's forward, where those of `functions` that it calls by name stand for its own.

    Its class and other modules stay as they are. None where it calls none of them, or is not
    Python's.
    """
    own = written(module)
    known = {name: f for name, f in functions.items() if calls(module, name)}
    if own is None or not known:
        return None
    names = own.__globals__ | known
    twin = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    twin.__kwdefaults__ = own.__kwdefaults__
    return MethodType(twin, module)
