"""The specification in plain torch: NF4 by decoding, deltas one term after the other."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fader_adapters.kernels import nf4
from fader_adapters.kernels.dense import ByRows, DenseLinear, filled, linear
from fader_adapters.kernels.nf4 import Nf4Weight, dense, stack
from fader_adapters.kernels.nf4_stack import Nf4Stack
from fader_adapters.kernels.stack_weights import StackWeight, filled_stack
from fader_adapters.kernels.tables import Tables
from fader_adapters.spec import SiteSpec, StepTerms

if TYPE_CHECKING:
    from fader_adapters.kernels.backend import BaseLinear, StackKernel

CHUNK = 4 << 20
"""Weights decoded at a time: a scratch that stays in cache and below the page-fault cliff."""


class DecodedLinear(ByRows):
    """An NF4 weight decoded in chunks of rows at every call; resident at 0.5625 byte a weight."""

    def __init__(self, weight: Nf4Weight, bias: torch.Tensor | None, *, chunk: int = CHUNK) -> None:
        self.weight = weight
        self._rows = max(1, chunk // weight.in_features)
        self.bias = bias
        self.out_features = weight.out_features
        self.in_features = weight.in_features

    @property
    def plain_dtype(self) -> None:
        return None

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._rows >= self.out_features:
            return linear(x, dense(self.weight, x.dtype), self.bias)
        y = x.new_empty(x.shape[0], self.out_features)
        for start in range(0, self.out_features, self._rows):
            stop = min(start + self._rows, self.out_features)
            bias = None if self.bias is None else self.bias[start:stop]
            y[:, start:stop] = linear(x, dense(self.weight.rows(start, stop), x.dtype), bias)
        return y

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return dense(self.weight, dtype)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return dense(self.weight.rows(start, stop), torch.float32)


class TorchRoom:
    """Merged weights as plain tensors: their memory is torch's."""

    def plain(
        self, rows: Iterable[torch.Tensor], shape: tuple[int, int], bias: torch.Tensor | None
    ) -> DenseLinear:
        return DenseLinear(filled(rows, shape), bias)

    head = plain

    def nf4(
        self, rows: Iterable[Nf4Weight], shape: tuple[int, int], bias: torch.Tensor | None
    ) -> DecodedLinear:
        return DecodedLinear(nf4.filled(rows, shape), bias)

    def stack(
        self,
        matrices: Iterable[torch.Tensor],
        shape: tuple[int, int, int],
        bias: torch.Tensor | None,
    ) -> StackWeight:
        return filled_stack(matrices, shape, bias)

    def nf4_stack(
        self, rows: Iterable[Nf4Weight], shape: tuple[int, int, int], bias: torch.Tensor | None
    ) -> Nf4Stack:
        return Nf4Stack.of(rows, shape, bias)


@dataclass(frozen=True)
class Share:
    """Tokens of a step that have one slot at the same place among their terms."""

    slot: int
    tokens: torch.Tensor
    """[n] int64"""
    gamma: torch.Tensor
    """[n, 1] float32, none of them 0."""


@dataclass(frozen=True)
class Operands:
    """What one slot has at one linear, in fp32."""

    a: torch.Tensor
    """[r, in]"""
    b: torch.Tensor
    """[out, r]"""
    scale: float
    gain: torch.Tensor | None
    """[out]"""
    shift: torch.Tensor | None
    """[out] scale · bias."""


class ReferenceStep:
    """The shares of one step, every row's in the order of its terms, and the operands brought for
    them so far."""

    def __init__(self, shares: list[Share], operands: "KeptOperands") -> None:
        self.shares = shares
        self._operands = operands

    def at(self, member: int, shape: tuple[int, int]) -> list[tuple[Share, Operands]]:
        """The shares that touch a linear of shape (in, out)."""
        found = ((s, self._operands.get(s.slot, member, shape)) for s in self.shares)
        return [(share, operands) for share, operands in found if operands is not None]


class KeptOperands:
    """Operands per (slot, linear), kept while the tables and the slots in use stay."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.generation = tables.generation
        self._kept: dict[tuple[int, int], Operands | None] = {}

    def keep_only(self, slots: set[int]) -> None:
        self._kept = {key: value for key, value in self._kept.items() if key[0] in slots}

    def get(self, slot: int, member: int, shape: tuple[int, int]) -> Operands | None:
        """None when the slot changes nothing at this linear. shape is (in, out)."""
        key = (slot, member)
        if key not in self._kept:
            self._kept[key] = self._bring(slot, member, *shape)
        return self._kept[key]

    def _bring(self, slot: int, member: int, width: int, out: int) -> Operands | None:
        t = self.tables
        rank, scale = int(t.rank[slot, member]), float(t.scale[slot, member])
        if not rank or not scale:
            return None
        gain = self._floats(t.gain_offset[slot, member], out)
        bias = self._floats(t.bias_offset[slot, member], out)
        a = self._floats(t.a_offset[slot, member], rank * width)
        b = self._floats(t.b_offset[slot, member], rank * out)
        assert a is not None
        assert b is not None
        b = b.view(rank, out).T.contiguous()
        return Operands(a.view(rank, width), b, scale, gain, None if bias is None else bias * scale)

    def _floats(self, offset: torch.Tensor, count: int) -> torch.Tensor | None:
        """[count] of the arena from an offset on; None where it is negative: there are none."""
        at = int(offset)
        return None if at < 0 else self.tables.arena[at : at + count].float()


class ReferenceBackend:
    """Runs anywhere torch runs. Every other backend is tested against it."""

    name = "reference"
    together: int | None = None

    def __init__(self) -> None:
        self._operands: KeptOperands | None = None

    def linear(self, weights: Sequence[Nf4Weight], bias: torch.Tensor | None) -> DecodedLinear:
        return DecodedLinear(stack(weights), bias)

    def room(self) -> TorchRoom:
        return TorchRoom()

    def prepare(self, tables: Tables, terms: StepTerms) -> ReferenceStep | None:
        if terms.idle:
            return None
        kept = self._operands
        if kept is None or kept.tables is not tables or kept.generation != tables.generation:
            kept = self._operands = KeptOperands(tables)
        shares = _shares(terms, tables.arena.device)
        kept.keep_only({share.slot for share in shares})
        return ReferenceStep(shares, kept)

    def bind(self, site: SiteSpec, base: "BaseLinear") -> "ReferenceSite":
        return ReferenceSite(site, base)

    def bind_lookup(self, site: SiteSpec) -> "ReferenceLookup":
        return ReferenceLookup(site)

    def router(self) -> None:
        return None

    def bind_stack(self, site: SiteSpec, experts: int) -> "StackKernel":
        from fader_adapters.kernels.reference_experts import ReferenceStack  # it knows our steps

        return ReferenceStack(site, experts)

    def pack_stack(self, weight: StackWeight | Nf4Stack) -> StackWeight | Nf4Stack:
        return weight


class ReferenceSite:
    """One site: the base, then each member's delta into its columns."""

    def __init__(self, site: SiteSpec, base: "BaseLinear") -> None:
        self.site = site
        self.base = base

    def __call__(self, x: torch.Tensor, step: object | None) -> torch.Tensor:
        y = self.base(x)
        if step is None:
            return y
        assert isinstance(step, ReferenceStep)
        column = 0
        for member, out in zip(self.site.linears, self.site.out_features, strict=True):
            found = [
                (share, operands, linear(x[share.tokens].float(), operands.a))
                for share, operands in step.at(member, (self.site.in_features, out))
            ]
            bias = None if self.base.bias is None else self.base.bias[column : column + out]
            _add(y[:, column : column + out], found, bias)
            column += out
        return y


class ReferenceLookup:
    """An embedding's delta: the columns of A that the tokens name, times B."""

    def __init__(self, site: SiteSpec) -> None:
        self.site = site

    def __call__(self, y: torch.Tensor, ids: torch.Tensor, step: object | None) -> None:
        if step is None:
            return
        assert isinstance(step, ReferenceStep)
        (member,), (out,) = self.site.linears, self.site.out_features
        found = [
            (share, operands, operands.a[:, ids[share.tokens]].T)
            for share, operands in step.at(member, (self.site.in_features, out))
        ]
        _add(y, found, None)


def _add(
    y: torch.Tensor, found: list[tuple[Share, Operands, torch.Tensor]], bias: torch.Tensor | None
) -> None:
    """y += G∘(y − bias) + Σ γ·s·(z·B + biasB), z = x·Aᵀ, G = Σ γ·gain, in fp32, rounded once.

    found  shares with their z [tokens of the share, r]; other tokens keep their bits
    bias   the base's own
    """
    if not found:
        return
    total = y.to(torch.float32, copy=True)
    for share, operands, z in found:
        delta = linear(z * (share.gamma * operands.scale), operands.b)
        if operands.gain is not None:
            base = y[share.tokens].float()
            plain = base if bias is None else base - bias.float()
            delta += share.gamma * operands.gain * plain
        if operands.shift is not None:
            delta += share.gamma * operands.shift
        total[share.tokens] += delta
    touched = torch.cat([share.tokens for share, _, _ in found]).unique()
    y[touched] = total[touched].to(y.dtype)


def _shares(terms: StepTerms, device: torch.device) -> list[Share]:
    """First what is the first term of its row, then the second terms, and so on: a row's own order,
    whatever its slots are called."""
    found: dict[tuple[int, int], tuple[list[int], list[float]]] = {}
    start = 0
    for row in terms.rows:
        for place, (slot, value) in enumerate(row.terms):
            if value:
                tokens, gamma = found.setdefault((place, slot), ([], []))
                tokens.extend(range(start, start + row.tokens))
                gamma.extend([value] * row.tokens)
        start += row.tokens
    return [
        Share(
            slot,
            torch.tensor(tokens, device=device),
            torch.tensor(gamma, dtype=torch.float32, device=device).unsqueeze(1),
        )
        for (_, slot), (tokens, gamma) in sorted(found.items())
    ]
