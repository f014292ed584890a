"""Tables that an adapter replaces, as deltas: rows for those that differ from the base's, or all of
a table beside a gain of −1. Knows tables that were checked; no names of modules.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fader_adapters.copies import tensor_of
from fader_adapters.errors import AdapterInvalid
from fader_adapters.factors import Factors, Linear, Part
from fader_adapters.header import TensorInfo
from fader_adapters.pauses import Pause
from fader_adapters.places import Place
from fader_adapters.saved import SavedTable
from fader_adapters.spec import BaseSpec, BaseWeights

WANTS_BASE = (
    "the adapter holds whole weights, which count as far as they differ from the base's own; "
    "those are not at hand here: name the base"
)
"""Why saved tables cannot be read without a base's weights."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of the base's table."""

    tokens: slice
    columns: slice
    own: torch.Tensor
    """[tokens, columns] in fp32, on the host; it may be the base's own memory"""


@dataclass(frozen=True, slots=True)
class Replaced:
    """One end of the base with a table of the adapter's."""

    place: Place
    values: torch.Tensor
    """[tokens, width] as saved; the base's own stand for tokens beyond."""
    changed: torch.Tensor
    """Booleans [vocabulary]"""


@dataclass(frozen=True, slots=True)
class Tables:
    """What an adapter's saved tables come to."""

    replaced: dict[int, Replaced]
    """By the linear's index; only those that differ."""
    unchanged: tuple[str, ...] = ()
    """Names of tensors that are the base's own."""
    not_compared: tuple[str, ...] = ()
    """Names of copies that must be the base's own, which is not at hand."""


def read_tables(
    data: bytes,
    saved: Iterable[SavedTable],
    base: BaseSpec,
    dtype: torch.dtype,
    weights: BaseWeights | None,
    pause: Pause,
    *,
    trusted: bool,
) -> Tables:
    """Compare every table with the base's. Raises AdapterInvalid: contradictory, not finite, or
    nothing to compare it with."""
    replaced: dict[int, Replaced] = {}
    same: list[str] = []
    untold: list[str] = []
    read: dict[tuple[TensorInfo, ...], torch.Tensor] = {}
    for table in saved:
        names = [info.name for info in table.infos]
        if weights is None and trusted and not table.trained:
            untold += names
            continue
        if weights is None:
            raise AdapterInvalid(f"tensor {names[0][:160]!r}: {WANTS_BASE}")
        (span,) = table.place.spans
        if table.infos not in read:
            read[table.infos] = _agreed(data, table.infos)
        values = read[table.infos]
        changed = _compare(values, _pieces(table.place, base, weights, pause), table, dtype)
        if bool(changed.any()):
            replaced[span.linear] = Replaced(table.place, values, changed)
        else:
            same += names
    return Tables(replaced, tuple(dict.fromkeys(same)), tuple(dict.fromkeys(untold)))


def as_linear(
    table: Replaced,
    lora: Sequence[Part],
    base: BaseSpec,
    dtype: torch.dtype,
    weights: BaseWeights,
    pause: Pause,
) -> Linear:
    """W → W' for the tokens that changed, and beside it LoRA that stands on W'; cast to `dtype`."""
    index = table.changed.nonzero().flatten()
    if table.place.role == "head":
        factors, take = _of_head(table, index, dtype), None
    else:
        factors, take = _of_embedding(table, index, dtype)
    square = 0.0
    for piece in _pieces(table.place, base, weights, pause):
        if take is not None:
            take(piece)
        square += _square(table, lora, piece, dtype)
    for part in lora:
        factors = _beside(factors, part)
    return Linear(factors, 1.0, math.sqrt(square))


def _of_head(table: Replaced, index: torch.Tensor, dtype: torch.dtype) -> Factors:
    """Logits of tokens that changed lose W·h by their gain and get W'·h."""
    tokens, width = table.place.table
    gain = torch.zeros(tokens, dtype=dtype)
    gain[index] = -1.0
    if len(index) < width:
        bt = torch.zeros(len(index), tokens, dtype=dtype)
        bt[torch.arange(len(index)), index] = 1.0
        return Factors(table.values[index].to(dtype), bt, gain)
    bt = torch.zeros(width, tokens, dtype=dtype)
    bt[:, : len(table.values)] = table.values.t()
    bt[:, ~table.changed] = 0.0
    return Factors(torch.eye(width, dtype=dtype), bt, gain)


def _of_embedding(
    table: Replaced, index: torch.Tensor, dtype: torch.dtype
) -> tuple[Factors, Callable[[Piece], None]]:
    """What makes rows of W into rows of W'; finished when all of the base's table was taken in."""
    tokens, width = table.place.table
    count = len(index)
    if 2 * count >= width:  # all that W gives is taken away, and every row given
        a = torch.empty(width, tokens, dtype=dtype)

        def place(piece: Piece) -> None:
            rows = piece.own.to(dtype, copy=True)
            here, new = _changed(table, piece)
            rows[here] = new.to(dtype)
            a[piece.columns, piece.tokens] = rows.t()

        gain = torch.full((width,), -1.0, dtype=dtype)
        return Factors(a, torch.eye(width, dtype=dtype), gain), place
    a = torch.zeros(2 * count, tokens, dtype=dtype)
    for start in (0, count):  # W' of a token, and −W
        a[torch.arange(start, start + count), index] = 1.0
    bt = torch.empty(2 * count, width, dtype=dtype)
    bt[:count] = table.values[index]
    row_of = torch.cumsum(table.changed, 0) - 1 + count

    def take_away(piece: Piece) -> None:
        here, _ = _changed(table, piece)
        bt[row_of[piece.tokens][here], piece.columns] = -piece.own[here].to(dtype)

    return Factors(a, bt), take_away


def _beside(factors: Factors, part: Part) -> Factors:
    """The same with the ranks of a LoRA module, its scale in its B."""
    dtype = factors.a.dtype
    return Factors(
        torch.cat([factors.a, part.a.to(dtype)]),
        torch.cat([factors.bt, (part.b.float() * part.scale).t().to(dtype)]),
        factors.gain,
        None if part.bias is None else (part.bias.float() * part.scale).to(dtype),
    )


def _pieces(place: Place, base: BaseSpec, weights: BaseWeights, pause: Pause) -> Iterator[Piece]:
    """All of the base's table. A tied one is read by the head's rows, which are its tokens."""
    (span,) = place.spans
    by_token = place.role == "head"
    linear = span.linear
    if base.tied and not by_token:
        heads = [i for i, item in enumerate(base.linears) if item.role == "head"]
        by_token, linear = bool(heads), (heads or [linear])[0]
    at, every = 0, slice(None)
    for panel in weights.panels(linear):
        some = slice(at, at := at + len(panel))
        own = panel.cpu()
        yield Piece(some, every, own) if by_token else Piece(every, some, own.t().contiguous())
        pause()


def _compare(
    values: torch.Tensor, pieces: Iterable[Piece], table: SavedTable, dtype: torch.dtype
) -> torch.Tensor:
    """Which tokens differ from the base's [vocabulary], be it as saved or as served."""
    changed = torch.zeros(table.place.table[0], dtype=torch.bool)
    for piece in pieces:
        new = values[piece.tokens, piece.columns]
        if not len(new):
            continue  # beyond a smaller vocabulary
        own, here = piece.own[: len(new)], changed[piece.tokens][: len(new)]
        served = new.to(dtype)
        if not all(map(math.isfinite, served.aminmax())):  # either is NaN where a value is
            raise AdapterInvalid(
                f"tensor {table.infos[0].name[:160]!r} has NaN or infinite values as {dtype}"
            )
        differs = served != own.to(dtype)
        if new.dtype != dtype:
            differs &= new != own.to(new.dtype)
        here |= differs.any(dim=1)
    return changed


def _changed(table: Replaced, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens of a piece changed, and what they are there now, as saved."""
    here = table.changed[piece.tokens]
    new = table.values[piece.tokens, piece.columns]
    return here, new[here[: len(new)]]


def _square(table: Replaced, lora: Iterable[Part], piece: Piece, dtype: torch.dtype) -> float:
    """‖ΔW‖² of a piece."""
    here, new = _changed(table, piece)
    change = torch.zeros_like(piece.own)
    change[here] = new.to(dtype).float() - piece.own[here]
    for part in lora:
        a, b = part.a.float(), part.b.float() * part.scale
        if table.place.role == "head":
            change += b[piece.tokens] @ a[:, piece.columns]
        else:
            change += (b[piece.columns] @ a[:, piece.tokens]).t()
    return float(torch.sum(change * change, dtype=torch.float64))


def _agreed(data: bytes, infos: Sequence[TensorInfo]) -> torch.Tensor:
    """What all of the tensors hold. Raises AdapterInvalid where it is not one content."""
    first, *others = infos
    values = tensor_of(data, first)
    for info in others:
        if not torch.equal(values, tensor_of(data, info).to(values.dtype)):
            raise AdapterInvalid(
                f"tensors {first.name[:160]!r} and {info.name[:160]!r} differ, and PEFT loads both "
                "into one place; keep the one that was trained"
            )
    return values
