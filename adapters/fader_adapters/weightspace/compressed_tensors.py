"""What compressed-tensors' configs say of weights, and which tensors are codes by them. Whole
numbers of four or eight bits and FP8; activations stay as they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fader_adapters.errors import BaseUnsupported, CheckpointInvalid
from fader_adapters.weightspace.code_layout import (
    Coded,
    ScaledWeight,
    beside,
    scales_beside,
    two_sizes,
)
from fader_adapters.weightspace.decoding import Grid
from fader_adapters.weightspace.tensors import Checkpoint

_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
_KINDS = {("float", 8): torch.float8_e4m3fn, ("int", 8): torch.int8, ("int", 4): None}
"""What is read, and the dtype of numbers that are not packed."""
_PACKED = ".weight_packed"
BESIDE = (
    _PACKED, ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx",
    ".weight_global_scale",
)  # fmt: skip
"""Ends of keys that mean nothing without a weight's codes."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How some of the weights are quantised."""

    kind: str
    bits: int
    symmetric: bool
    rows: int | None
    """Of a block that shares a scale; None: all."""
    columns: int | None
    ordered: bool
    """Whether each column tells its group."""

    @property
    def told(self) -> str:
        return f"{self.kind}{self.bits}"

    def grid(self, out: int, width: int) -> Grid:
        return Grid(self.rows or out, self.columns or width)

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether numbers by themselves would be of this dtype."""
        return _KINDS[self.kind, self.bits] == dtype

    def words(self, width: int) -> int:
        """Of 32 bits, that a packed row takes."""
        return -(-width * self.bits // 32)


def schemes_of(facts: Mapping[str, Any]) -> list[Scheme]:
    """Those of a `quantization_config`. Raises BaseUnsupported, with what is not read."""
    for name in ("sparsity_config", "transform_config"):
        told = facts.get(name)
        if told and not (isinstance(told, dict) and told.get("format") == "dense"):
            raise BaseUnsupported(f"compressed-tensors with {name}")
    groups = facts.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise BaseUnsupported("compressed-tensors without config_groups")
    found = []
    for group in groups.values():
        form = group.get("format") or facts.get("format")
        if form not in _FORMATS:
            raise BaseUnsupported(f"compressed-tensors in the form {form}")
        if isinstance(group.get("weights"), dict):
            found.append(_scheme(group["weights"]))
    return found


def _scheme(weights: Mapping[str, Any]) -> Scheme:
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    group, block = weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy") or {None: "tensor", -1: "channel"}.get(group, "group")
    rows: int | None = 1
    columns: int | None = None
    if strategy == "tensor":
        rows = None
    elif strategy == "group" and type(group) is int and group > 0:
        columns = group
    elif strategy == "block" and (sizes := two_sizes(block)):
        rows, columns = sizes.rows, sizes.columns
    elif strategy != "channel":
        raise BaseUnsupported(f"compressed-tensors by {strategy} of {group or block}")
    if (kind, bits) not in _KINDS or weights.get("dynamic"):
        raise BaseUnsupported(f"compressed-tensors with weights in {kind}{bits}")
    ordered = weights.get("actorder") in (True, "group", "dynamic")
    return Scheme(kind, bits, bool(weights.get("symmetric", True)), rows, columns, ordered)


def find(files: Checkpoint, *, schemes: Sequence[Scheme]) -> Iterator[Coded]:
    """The weights that a checkpoint holds so. Raises CheckpointInvalid, with the key."""
    for key, stored in files.tensors.items():
        if key.endswith(_PACKED):
            yield _packed(files, key, schemes)
        elif key.endswith(".weight") and len(stored.shape) == 2:
            own = [scheme for scheme in schemes if scheme.holds(stored.dtype)]
            if own:
                yield _weight(files, key, stored.shape, own, packed=False)


def _packed(files: Checkpoint, key: str, schemes: Sequence[Scheme]) -> Coded:
    stored, module = files.tensors[key], key.removesuffix(_PACKED)
    told = beside(files, key, f"{module}.weight_shape")
    shape = tuple(map(int, files.read(told.key))) if told.numel == 2 else ()
    own = [
        scheme
        for scheme in schemes
        if len(shape) == 2
        and scheme.kind == "int"
        and stored.shape == (shape[0], scheme.words(shape[1]))
    ]
    if not own or stored.dtype != torch.int32:
        raise CheckpointInvalid(
            f"{key!r} is {stored.dtype} of shape {stored.shape} for a weight of shape {shape}, "
            f"expected int32 with {' or '.join(scheme.told for scheme in schemes)} packed"
        )
    return _weight(files, key, shape, own, packed=True)


def _weight(
    files: Checkpoint, key: str, shape: tuple[int, ...], schemes: Sequence[Scheme], *, packed: bool
) -> Coded:
    """One whose scheme is among these, known by the shape of its scales."""
    module = key.removesuffix(_PACKED if packed else ".weight")
    scales = f"{module}.weight_scale"
    given = scales_beside(files, key, scales)
    as_grid = given if len(given) == 2 else (*given, 1, 1)[: max(2, len(given))]
    own = [scheme for scheme in schemes if scheme.grid(*shape).shape(*shape) == as_grid]
    grids = {(scheme.grid(*shape), scheme.bits) for scheme in own}
    if len(grids) != 1:
        expected = {scheme.grid(*shape).shape(*shape) for scheme in schemes}
        raise CheckpointInvalid(
            f"{scales!r} is of shape {given} for a weight of shape {shape}, "
            f"expected {' or '.join(map(str, sorted(expected)))}, by one scheme"
        )
    ((grid, bits),) = grids
    zeros = _zeros(files, f"{module}.weight_zero_point", grid.shape(*shape), bits, packed=packed)
    if zeros is None and not all(scheme.symmetric for scheme in own):
        beside(files, key, f"{module}.weight_zero_point")
    groups = f"{module}.weight_g_idx"
    if not any(scheme.ordered for scheme in own):
        groups = groups if groups in files.tensors else None
    if groups is not None and beside(files, key, groups).shape != (shape[1],):
        raise CheckpointInvalid(f"{groups!r} is not of shape {(shape[1],)}")
    of_no_weight = ("weight_shape", "input_scale", "input_zero_point")
    spent = tuple(
        f"{module}.{name}" for name in of_no_weight if f"{module}.{name}" in files.tensors
    )
    return ScaledWeight(
        f"{module}.weight", key, shape, grid, scales,
        in_fp32=False, zeros=zeros, column_groups=groups, bits=bits if packed else None,
        dropped=spent,
    )  # fmt: skip


def _zeros(
    files: Checkpoint, key: str, grid: tuple[int, int], bits: int, *, packed: bool
) -> str | None:
    """The key of zero points, where there are some. Raises CheckpointInvalid."""
    found = files.tensors.get(key)
    if found is None:
        return None
    words = (-(-grid[0] * bits // 32), grid[1])
    in_words = packed and found.dtype == torch.int32 and found.shape == words
    if not in_words and (found.dtype == torch.int32 or found.numel != grid[0] * grid[1]):
        raise CheckpointInvalid(f"{key!r} is {found.dtype} of shape {found.shape}, not one a scale")
    return key
