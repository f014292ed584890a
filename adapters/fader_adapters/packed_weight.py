"""What a model may know of a linear's weight that it does not hold itself: all but its values."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch


class WeightRead(AttributeError):
    """A model reads a linear's weight by itself."""


class PackedWeight:
    """Stands for the weight: models ask what to cast an input to. Values raise WeightRead."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        """Its own, or that of the activations where it is packed."""
        self.device = device

    def __getattr__(self, name: str) -> NoReturn:
        raise WeightRead(f"a linear's weight has no {name!r}")

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        given: Mapping[str, Any] | None = None,
    ) -> NoReturn:
        raise WeightRead(f"a linear's weight is no tensor for {getattr(function, '__name__', '')}")
