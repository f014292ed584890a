"""What two models differ in besides the linears an adapter carries. Compares, piece by piece."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fader_adapters.weightspace.base import Base

_COMPUTED = ("rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias", ".attention.bias")
"""Ends of keys of old checkpoints that are buffers, where the model knows no such parameter."""

Kind = Literal["changed", "another shape", "only in the fine-tune", "only in the base"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor."""

    name: str
    """The model's own name of it."""
    kind: Kind
    relative_norm: float | None = None
    """‖T* − T‖ / ‖T‖ where both are there and ‖T‖ is not 0."""

    def document(self) -> dict[str, Any]:
        """For reports."""
        return {"name": self.name, "kind": self.kind, "relative_norm": self.relative_norm}


def find(tuned: Base, original: Base, *, carried: Collection[str]) -> Iterator[Difference]:
    """Every tensor that differs, except the weights of the linears in `carried` (paths)."""
    skipped = {f"{path}.weight" for path in carried}
    theirs, ours = _by_name(tuned), _by_name(original)
    linears = {f"{linear.path}.weight": linear for linear in original.inside}
    for name in dict.fromkeys((*ours, *theirs)):
        if name in skipped:
            continue
        if name not in theirs or name not in ours:
            yield Difference(name, "only in the base" if name in ours else "only in the fine-tune")
        elif name in linears and name in tuned.names and name in original.names:
            linear = linears[name]
            found = _compare_pair(name, tuned.dense(linear), original.dense(linear))
            if found is not None:
                yield found
        else:
            found = _compare(name, tuned, theirs[name], original, ours[name])
            if found is not None:
                yield found


def _by_name(base: Base) -> dict[str, str]:
    """Name → key of all that the model reads; of what is stored fused, the key itself."""
    known = {key: name for name, key in base.names.items()}
    keys = base.checkpoint.tensors
    packed = {key for key in keys if base.is_packed(key)}
    return {
        known.get(key, key): key
        for key in keys
        if (key in known or not key.endswith(_COMPUTED))
        and not any(key.startswith(f"{owner}.") for owner in _owners(key) & packed)
    }


def _owners(key: str) -> set[str]:
    parts = key.split(".")
    return {".".join(parts[:at]) for at in range(1, len(parts))}


def _compare(name: str, tuned: Base, theirs: str, original: Base, ours: str) -> Difference | None:
    left, right = tuned.checkpoint, original.checkpoint
    if left.tensors[theirs].shape != right.tensors[ours].shape:
        return Difference(name, "another shape")
    square = norm = 0.0
    for new, old in zip(left.chunks(theirs), right.chunks(ours), strict=True):
        square += _square(new.double() - old.double())
        norm += _square(old.double())
    return _difference(name, square, norm)


def _compare_pair(name: str, new: torch.Tensor, old: torch.Tensor) -> Difference | None:
    return _difference(name, _square(new - old), _square(old))


def _difference(name: str, square: float, norm: float) -> Difference | None:
    if square == 0.0:
        return None
    return Difference(name, "changed", math.sqrt(square / norm) if norm else None)


def _square(values: torch.Tensor) -> float:
    return float(torch.sum(values * values, dtype=torch.float64))
