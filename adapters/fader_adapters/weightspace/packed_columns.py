"""GPTQ's and AWQ's linears: whole numbers that lie packed with a weight's columns as rows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fader_adapters.errors import BaseUnsupported, CheckpointInvalid
from fader_adapters.weightspace.code_layout import (
    Coded,
    beside,
    finite,
    groups_of,
    pieces,
    scales_beside,
)
from fader_adapters.weightspace.decoding import Grid, scaled, unsigned
from fader_adapters.weightspace.tensors import Checkpoint

_CODES = ".qweight"
BESIDE = (_CODES, ".qzeros", ".scales", ".g_idx")
"""Ends of keys that mean nothing without a weight's codes."""
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AWQ's each of eight numbers lies."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a config says of all such linears of a checkpoint."""

    bits: int
    group: int | None
    """Columns that share scales; None: all."""
    by_awq: bool
    """Words hold numbers of a column, in an order of their own; else of a row."""
    zeros_less_one: bool
    """Zero points are stored so."""
    ordered: bool
    """Every column tells its group."""

    @property
    def told(self) -> str:
        return f"{'AWQ' if self.by_awq else 'GPTQ'} in {self.bits} bits"


def gptq(facts: Mapping[str, Any]) -> Form:
    """Raises BaseUnsupported, with what is not read."""
    form = facts.get("checkpoint_format") or "gptq"
    if form not in ("gptq", "gptq_v2") or facts.get("dynamic"):
        raise BaseUnsupported(f"gptq in the form {'dynamic' if facts.get('dynamic') else form}")
    return _form(facts, (4, 8), by_awq=False, zeros_less_one=form == "gptq")


def awq(facts: Mapping[str, Any]) -> Form:
    """Raises BaseUnsupported, with what is not read."""
    version, backend = str(facts.get("version") or "gemm").lower(), facts.get("backend")
    if version != "gemm" or backend not in (None, "autoawq") or facts.get("zero_point") is False:
        raise BaseUnsupported(f"awq of version {version} by {backend}, expected gemm by autoawq")
    return _form(facts, (4,), by_awq=True, zeros_less_one=False)


def _form(
    facts: Mapping[str, Any], widths: tuple[int, ...], *, by_awq: bool, zeros_less_one: bool
) -> Form:
    bits, group = facts.get("bits", 4), facts.get("group_size", 128)
    if bits not in widths or type(group) is not int or group < -1 or group == 0:
        raise BaseUnsupported(
            f"{facts['quant_method']} in {bits} bits by groups of {group}, "
            f"expected {' or '.join(map(str, widths))} bits"
        )
    ordered = not by_awq and bool(facts.get("desc_act"))
    return Form(bits, None if group == -1 else group, by_awq, zeros_less_one, ordered)


@dataclass(frozen=True, slots=True)
class ColumnWeight:
    """Codes of Wᵀ [width, out]."""

    name: str
    key: str
    shape: tuple[int, int]
    form: Form
    scales: str
    """[groups, out]"""
    zeros: str
    """Packed like AWQ's codes, or like those with their numbers in order."""
    groups: str | None
    """[width], which row of scales each column has; None: one after the other."""

    @property
    def parts(self) -> tuple[str, ...]:
        given = (self.key, self.scales, self.zeros, self.groups)
        return tuple(key for key in given if key is not None)

    def read(self, files: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
        """`shape` in `dtype`, contiguous. Raises CheckpointInvalid."""
        made = torch.empty(self.shape, dtype=dtype)
        scales, bits = finite(files, self.scales), self.form.bits
        zeros = self._along(files.read(self.zeros)).to(torch.int16)
        if self.form.zeros_less_one:
            zeros = (zeros + 1) & ((1 << bits) - 1)
        words = pieces(files, self.key)
        codes = map(self._along if self.form.by_awq else self._across, words)
        grid = Grid(self.form.group or self.shape[1], 1)
        groups = None if self.groups is None else groups_of(files, self.groups, len(scales))
        scaled(codes, scales, grid, made.T, zeros=zeros, row_groups=groups)
        return made

    def _along(self, words: torch.Tensor) -> torch.Tensor:
        """[n, out] of words [n, out · bits / 32]."""
        numbers = unsigned(words, self.form.bits)
        if self.form.by_awq:
            numbers = numbers.view(len(words), -1, 8)[:, :, _AWQ_ORDER].reshape(len(words), -1)
        return numbers

    def _across(self, words: torch.Tensor) -> torch.Tensor:
        """[n · 32 / bits, out] of words [n, out]."""
        each = unsigned(words.reshape(-1, 1), self.form.bits).view(*words.shape, -1)
        return each.transpose(1, 2).reshape(-1, words.shape[1])


def find(files: Checkpoint, *, form: Form) -> Iterator[Coded]:
    """The weights that a checkpoint holds so. Raises CheckpointInvalid, with the key."""
    each = 32 // form.bits
    for key, stored in files.tensors.items():
        if not key.endswith(_CODES):
            continue
        module = key.removesuffix(_CODES)
        zeros = beside(files, key, f"{module}.qzeros")
        scales = scales_beside(files, key, f"{module}.scales")
        if len(stored.shape) != 2 or stored.dtype != torch.int32 or zeros.dtype != torch.int32:
            raise CheckpointInvalid(f"{key!r} is {stored.dtype} of shape {stored.shape}, not words")
        rows, columns = stored.shape
        width, out = (rows, columns * each) if form.by_awq else (rows * each, columns)
        count, _ = Grid(form.group or width, 1).shape(width, out)
        if scales != (count, out) or zeros.shape != (count, out // each) or out % each:
            raise CheckpointInvalid(
                f"{module!r} has scales of shape {scales} and zero points of shape {zeros.shape} "
                f"for {(width, out)}, expected {(count, out)} and {(count, out // each)}"
            )
        groups = f"{module}.g_idx"
        if not form.ordered and groups not in files.tensors:
            groups = None
        elif beside(files, key, groups).shape != (width,):
            raise CheckpointInvalid(f"{groups!r} is not of shape {(width,)}")
        yield ColumnWeight(
            f"{module}.weight", key, (out, width), form, f"{module}.scales", zeros.key, groups
        )
