"""What becomes of every tensor of a base in a merge, and in which shard. Names and sizes only."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from fader_adapters.errors import BaseUnsupported, CheckpointInvalid
from fader_adapters.kernels.nf4 import BLOCK
from fader_adapters.stacks import absmax_of
from fader_adapters.weightspace import quantised
from fader_adapters.weightspace.base import Base
from fader_adapters.weightspace.tensors import SINGLE_FILE, Stored

Form = Literal["bf16", "nf4"]
"""What the linears of a merged checkpoint are in."""


Fate = Literal["copy", "cast", "dense", "nf4", "bias"]
"""As it is; cast to bf16; a linear written densely, or in NF4; a bias that changes."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the base, or one NF4 weight with its components, and its fate."""

    key: str
    fate: "Fate"
    linear: int | None
    """Index in BaseSpec.linears, where it is one or its bias."""
    names: tuple[str, ...]
    """What will be written."""
    nbytes: int
    """Nearly."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the output."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def names(self) -> list[str]:
        return [name for piece in self.pieces for name in piece.names]


def plan(
    base: Base,
    adapted: Collection[int],
    form: Form,
    *,
    shard_bytes: int,
    biased: Collection[int] = (),
) -> list[Shard]:
    """The shards in order. Deterministic: the same inputs, the same shards.

    `biased`: linears whose bias changes. Raises CheckpointInvalid when a linear that must change
    is not stored by itself, BaseUnsupported when it has no bias that could.
    """
    groups: list[list[Piece]] = []
    room = 0
    for piece in _pieces(base, adapted, form, _bias_keys(base, biased)):
        if not groups or piece.nbytes > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(piece)
        room -= piece.nbytes
    if len(groups) == 1:
        return [Shard(SINGLE_FILE, tuple(groups[0]))]
    return [
        Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for i, group in enumerate(groups, 1)
    ]


def unties(base: Base, adapted: Collection[int]) -> bool:
    """Whether head and embedding, one table in the base, are two in the output."""
    ends = ("embedding", "head")
    return base.spec.tied and any(base.spec.linears[index].role in ends for index in adapted)


def _bias_keys(base: Base, biased: Collection[int]) -> dict[str, int]:
    """Where the biases that change are stored."""
    keys: dict[str, int] = {}
    for index in biased:
        path = base.spec.linears[index].path
        key = base.names.get(f"{path}.bias")
        if key is None:
            raise BaseUnsupported(
                f"{path!r} has no bias in the base, which the adapter's lora_bias could be added "
                "to; serve it as an adapter"
            )
        keys[key] = index
    return keys


def _pieces(
    base: Base, adapted: Collection[int], form: Form, biases: dict[str, int]
) -> Iterator[Piece]:
    tensors = base.checkpoint.tensors
    linears = base.spec.linears
    must = {i for i, linear in enumerate(linears) if i in adapted or _fresh(base, i, form)}
    indices = {key: i for i in must for key in base.keys(linears[i])}
    indices |= {
        base.names[f"{linear.path}.weight"]: i
        for i, linear in enumerate(linears)
        if f"{linear.path}.weight" in base.names
    }
    inside = {
        f"{key}.{part}": key
        for key in tensors
        if base.is_packed(key)
        for part in quantised.COMPONENTS
    }
    for i, linear in enumerate(linears):
        for part in base.stacks.get(linear.path, ()):  # what does not change may be stored anyhow
            if base.holds_packed(part.key):
                indices[part.key], inside[absmax_of(part.key)] = i, part.key
    untied = _untied(base) if unties(base, adapted) else None
    if untied is not None:
        indices[untied.table] = untied.embedding
    for key, stored in sorted(tensors.items(), key=lambda i: (i[1].file.name, i[1].start)):
        if key in biases:
            yield Piece(key, "bias", biases[key], (key,), stored.nbytes)
            continue
        if untied is not None and key == untied.spare:
            continue
        owner = inside.get(key, key)
        fate = _fate(base, owner, indices.get(owner), adapted, form)
        if owner != key and fate != "copy":
            continue  # written with its weight
        yield _piece(base, stored, fate, indices.get(owner))
        if untied is not None and key == untied.table:
            yield Piece(untied.name, "dense", untied.head, (untied.name,), 2 * stored.numel)


@dataclass(frozen=True, slots=True)
class _Untied:
    """A tied base's one table, to be written as two."""

    embedding: int
    head: int
    table: str
    """Where it is stored."""
    name: str
    """Of the head's weight."""
    spare: str | None
    """Where the files hold the head once more; nobody reads that."""


def _untied(base: Base) -> _Untied:
    place = {linear.role: i for i, linear in enumerate(base.spec.linears)}
    embedding, head = place["embedding"], place["head"]
    name = f"{base.spec.linears[head].path}.weight"
    table = base.key(base.spec.linears[embedding])
    return _Untied(embedding, head, table, name, base.names.get(name))


def _fresh(base: Base, linear: int, form: Form) -> bool:
    """Whether the output holds a linear in NF4 that the base holds densely."""
    path = base.spec.linears[linear].path
    return form == "nf4" and not base.in_nf4 and path in base.quantisable


def _fate(base: Base, key: str, linear: int | None, adapted: Collection[int], form: Form) -> Fate:
    packed = base.is_packed(key) or base.holds_packed(key)
    if form == "bf16":
        if packed or linear in adapted:
            return "dense"
        dtype = base.checkpoint.tensors[key].dtype
        # 8-bit floats are quantised weights with scales beside them, not numbers to cast
        return "cast" if dtype.is_floating_point and dtype.itemsize in (2, 4, 8) else "copy"
    if linear is None:
        return "copy"
    if _fresh(base, linear, form):
        return "nf4"
    if linear not in adapted:
        return "copy"
    return "nf4" if packed else "dense"


def _piece(base: Base, stored: Stored, fate: Fate, linear: int | None) -> Piece:
    key, names = stored.key, (stored.key,)
    if fate == "copy":
        return Piece(key, fate, linear, names, stored.nbytes)
    if fate == "nf4" and base.holds_packed(key):
        weights = 2 * stored.numel
        return Piece(key, fate, linear, (key, absmax_of(key)), weights // 2 + weights // BLOCK * 4)
    if fate == "nf4":
        parts = [part for part in quantised.COMPONENTS if nests(base, key) or "nested" not in part]
        names = (key, *(f"{key}.{part}" for part in parts))
        weights = _weights(base, stored, linear)
        return Piece(key, fate, linear, names, weights // 2 + weights // BLOCK + (8 << 10))
    return Piece(key, fate, linear, names, 2 * _weights(base, stored, linear))


def nests(base: Base, key: str) -> bool:
    """Whether a weight's absmax is (or is to be) quantised too: as in the base, else yes."""
    return not base.is_packed(key) or f"{key}.nested_absmax" in base.checkpoint.tensors


def _weights(base: Base, stored: Stored, linear: int | None) -> int:
    if base.holds_packed(stored.key):
        return 2 * stored.numel
    if not base.is_packed(stored.key):
        return stored.numel
    if linear is None:
        return 2 * stored.numel
    spec = base.spec.linears[linear]
    own = spec.in_features * spec.out_features
    if 2 * stored.numel != own and spec.role != "experts":  # of those one matrix, or a part of it
        raise CheckpointInvalid(f"{stored.key!r} holds {2 * stored.numel} weights of {spec}")
    return 2 * stored.numel
