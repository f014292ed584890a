"""A stack of experts of a base to that of a merge, in the form it is stored in."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fader_adapters.kernels import nf4
from fader_adapters.spec import LinearSpec
from fader_adapters.stacks import absmax_of
from fader_adapters.weightspace import disk, quantised
from fader_adapters.weightspace.base import Base
from fader_adapters.weightspace.loss import LinearLoss, Rows, joined, measure
from fader_adapters.weightspace.plan import Form, Piece
from fader_adapters.weightspace.stored_experts import StoredRows
from fader_adapters.weightspace.terms import Mixture


def write_experts(
    base: Base, mixture: Mixture, form: Form, piece: Piece, writer: disk.ShardWriter
) -> LinearLoss | None:
    """Write what one key of a stack becomes: one matrix of an expert, or all of every expert.

    Returns what rounding cost, None where nothing is added. Raises CheckpointInvalid.
    """
    index = piece.linear
    assert index is not None
    linear = base.spec.linears[index]
    (part,) = (part for part in base.experts(linear) if part.key == piece.key)
    made = _made(base, form, piece, linear, part)
    losses: list[LinearLoss] = []
    for place, (rows, stored) in enumerate(base.matrices(linear, part)):
        delta = mixture.sum(index, rows.expert)
        merged = stored.to(torch.float32, copy=True)
        if delta is not None:
            merged.addmm_(delta.b[rows.start : rows.stop], delta.a)
        quantised.require_finite(merged)
        after = made.put(place, merged)
        if delta is not None:
            before = rows_of(stored)
            losses.append(
                measure(
                    *(linear.path, delta.rank, merged), before=before, served=before, after=after
                )
            )
    for name, tensor in made.tensors.items():
        writer.add(name, [tensor], dtype=tensor.dtype, shape=tuple(tensor.shape))
    return joined(losses) if losses else None


@dataclass(frozen=True, slots=True)
class _Experts:
    """What is written under one key of a stack."""

    tensors: dict[str, torch.Tensor]
    places: Sequence[torch.Tensor] = ()
    """Where its matrices go: [rows, in] each, or packed [rows, in/2]; () for one in bitsandbytes'
    own form."""
    absmax: torch.Tensor | None = None
    """[experts, out, in/64] where a whole stack is packed."""
    like: quantised.Packed | None = None
    """What one in that form is made like."""
    key: str = ""

    def put(self, place: int, merged: torch.Tensor) -> Rows:
        """Round one matrix; the rows that it has then."""
        if self.like is not None:
            nested = self.like.state.nested
            packed = quantised.quantise(merged, dtype=self.like.dtype, nested=nested)
            self.tensors.update(packed.tensors(self.key))
            return rows_of(packed)
        if self.absmax is None:
            self.places[place].copy_(merged)
            return rows_of(self.places[place])
        packed = quantised.quantise(merged, dtype=torch.float32, nested=False)
        self.places[place].copy_(packed.weight.packed.view_as(self.places[place]))
        self.absmax[place] = packed.weight.absmax.view_as(self.absmax[place])
        return rows_of(packed)


def _made(base: Base, form: Form, piece: Piece, linear: LinearSpec, part: StoredRows) -> _Experts:
    key, given = piece.key, base.checkpoint.tensors[piece.key]
    rows, width = (linear.experts, linear.out_features), linear.in_features
    if piece.fate == "nf4" and part.expert is not None:
        return _Experts({}, like=base.packed(key), key=key)
    if piece.fate == "nf4":
        codes = torch.empty(given.shape, dtype=torch.uint8)
        absmax = torch.empty(*rows, width // nf4.BLOCK)
        return _Experts({key: codes, absmax_of(key): absmax}, list(codes), absmax)
    shape = given.shape
    if part.expert is not None:
        shape = (part.stop - part.start, width)
    elif base.holds_packed(key):
        shape = (rows[0], width, rows[1]) if linear.conv1d else (*rows, width)
    made = torch.empty(shape, dtype=torch.bfloat16 if form == "bf16" else given.dtype)
    if part.expert is not None:
        return _Experts({key: made}, [made])
    return _Experts({key: made}, list(made.mT if linear.conv1d else made))


def rows_of(weight: torch.Tensor | quantised.Packed) -> Rows:
    """Its rows in fp32."""
    if isinstance(weight, torch.Tensor):
        return lambda start, stop: weight[start:stop].to(torch.float32)
    readable = weight.weight
    return lambda start, stop: nf4.dense(readable.rows(start, stop), torch.float32)
