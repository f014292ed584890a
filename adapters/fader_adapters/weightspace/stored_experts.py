"""How a checkpoint holds stacks of experts: each as one tensor, or every expert's matrices apart.

Knows transformers' conversions by what they do, and headers.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from fader_adapters.errors import CheckpointInvalid
from fader_adapters.kernels.nf4 import BLOCK, Nf4Weight
from fader_adapters.kernels.nf4_stack import Nf4Stack
from fader_adapters.spec import LinearSpec
from fader_adapters.stacks import absmax_of, in_nf4
from fader_adapters.weightspace.quantised import STATE
from fader_adapters.weightspace.tensors import Checkpoint

_NUMBER = re.compile(r".*\.(\d+)\.[^.]+\.weight", re.ASCII)


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows start..stop of W of one expert under a key of their own; None: all of every expert's."""

    key: str
    expert: int | None
    start: int
    stop: int


def stored_rows(
    linear: LinearSpec,
    sources: Sequence[tuple[str, str]],
    converters: Sequence[WeightConverter],
    checkpoint: Checkpoint,
) -> tuple[StoredRows, ...]:
    """The rows of one stack, expert by expert; () where they are not all there as they should be.

    sources  keys of the checkpoint that become the stack, each with the converter's pattern for it
    """
    order = _order({pattern for _, pattern in sources}, converters)
    found: dict[int, dict[int, str]] = {}
    for key, pattern in sources:
        match = _NUMBER.fullmatch(key)
        if match is None or pattern not in order:
            return ()
        found.setdefault(int(match[1]), {})[order[pattern]] = key
    rows: list[StoredRows] = []
    for expert in range(linear.experts):
        own = list(_rows(expert, found.get(expert, {}), linear, checkpoint))
        if not own or own[-1].stop != linear.out_features:
            return ()
        rows += own
    return tuple(rows)


def _order(patterns: set[str], converters: Sequence[WeightConverter]) -> Mapping[str, int]:
    """Place of each pattern among the matrices that lie one after the other in an expert; empty
    where the conversion does anything else."""
    for converter in converters:
        if patterns.issubset(converter.source_patterns):
            first, *others = converter.operations
            stacks = isinstance(first, MergeModulelist) and first.dim == 0
            if stacks and all(isinstance(o, Concatenate) and o.dim == 1 for o in others):
                return {pattern: i for i, pattern in enumerate(converter.source_patterns)}
    return {}


def _rows(
    expert: int, keys: Mapping[int, str], linear: LinearSpec, checkpoint: Checkpoint
) -> Iterator[StoredRows]:
    at = 0
    for _, key in sorted(keys.items()):
        shape = checkpoint.tensors[key].shape
        if f"{key}.{STATE}" in checkpoint.tensors:  # bytes of two weights
            shape = (2 * math.prod(shape) // linear.in_features, linear.in_features)
        if len(shape) != 2 or shape[1] != linear.in_features:
            return
        yield StoredRows(key, expert, at, at := at + shape[0])


def read_packed(linear: LinearSpec, key: str, checkpoint: Checkpoint) -> Nf4Stack:
    """The stack that `key` and its scales are, in NF4. Raises CheckpointInvalid."""
    codes, absmax = checkpoint.read(key), checkpoint.read(absmax_of(key))
    count, out, width = linear.experts, linear.out_features, linear.in_features
    shapes = ((count, out, width // 2), (count, out, width // BLOCK))
    if (tuple(codes.shape), tuple(absmax.shape)) != shapes or not in_nf4(codes):
        raise CheckpointInvalid(
            f"{key!r} is {codes.dtype} of shape {tuple(codes.shape)} with scales of shape "
            f"{tuple(absmax.shape)}, expected NF4 of {count} matrices [{out}, {width}]"
        )
    return Nf4Stack(Nf4Weight(codes.view(-1), absmax.view(-1), count * out, width), count, None)
