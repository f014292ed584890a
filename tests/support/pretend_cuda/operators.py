"""What torch's operators mean on a GPU: which make the host wait, which read, write or only look.

Knows names and arguments; runs nothing.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from tests.support.pretend_cuda.tensor import Pretend

WAITS = {
    "_local_scalar_dense",
    "equal",
    "allclose",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "_linalg_check_errors",
}
"""Their results, or their sizes, are known on the host when they return."""

INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}

NO_SCALARS = {"index_select", "gather", "embedding", "mm", "addmm", "bmm", "index_copy", "where"}
"""They take no tensor of the host, not even one number ("where" does; its condition does not)."""

EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
"""Their values are undefined."""

MISMATCH = (
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
    "cpu! (when checking arguments of {name})"
)


def name_of(func: Any) -> str:
    """aten's or another library's name, without overload."""
    return func._schema.name.split("::", 1)[1]


def tensors_in(*trees: object) -> Iterator[torch.Tensor]:
    """Every tensor in some arguments."""
    for leaf in tree_leaves(trees):
        if isinstance(leaf, torch.Tensor):
            yield leaf


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The arguments that an operator writes."""
    found: list[torch.Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += tensors_in(value)
    return found


def makes_wait(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the host waits for the device before such a call returns."""
    if name in WAITS:
        return True
    if name == "repeat_interleave" and isinstance(args[-1], torch.Tensor):
        return kwargs.get("output_size") is None
    if name not in INDEXING:
        return False
    places = list(tensors_in(args[1]))
    if any(place.dtype in (torch.bool, torch.uint8) for place in places):
        value = args[2] if len(args) > 2 else None
        # one number at the places of one mask is filled in without knowing them
        return not (
            len(places) == 1
            and isinstance(value, torch.Tensor)
            and value.numel() == 1
            and not isinstance(value, Pretend)
        )
    return any(not isinstance(place, Pretend) and place.dim() > 0 for place in places)


def mismatched(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether operands lie in two places where torch wants one."""
    operands = list(tensors_in(args, kwargs))
    if name in INDEXING:
        operands = [args[0], *tensors_in(args[2:])]
    if not any(isinstance(operand, Pretend) for operand in operands):
        return False

    def fits(operand: torch.Tensor) -> bool:
        if isinstance(operand, Pretend):
            return True
        scalars = name not in NO_SCALARS or (name == "where" and operand is not args[0])
        return operand.dim() == 0 and scalars

    return not all(map(fits, operands))
