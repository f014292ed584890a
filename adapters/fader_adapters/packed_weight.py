"""What a model may know of a linear's weight that it does not hold itself: all but its values."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_leaves


class WeightRead(AttributeError):
    """A model reads a linear's weight by itself."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(f"{path or 'a linear'}'s weight {what}")
        self.path = path


class PackedWeight:
    """Stands for the weight: models ask what to cast an input to. Values raise WeightRead."""

    def __init__(self, dtype: torch.dtype, device: torch.device, path: str = "") -> None:
        """path: of the linear, for who reads on."""
        self.dtype = dtype
        """Its own, or that of the activations where it is packed."""
        self.device = device
        self._path = path

    def __getattr__(self, name: str) -> NoReturn:
        raise WeightRead(self._path, f"has no {name!r}")

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        given: Mapping[str, Any] | None = None,
    ) -> NoReturn:
        own = next(leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, cls))
        raise WeightRead(own._path, f"is no tensor for {getattr(function, '__name__', '')}")
