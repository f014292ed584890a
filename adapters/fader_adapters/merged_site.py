"""One site on its way into a merged lane: rows of W in, rounded rows of W + Δ out."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from fader_adapters.changes import Change, Changes
from fader_adapters.kernels import nf4
from fader_adapters.kernels.backend import BaseLinear, ExpertsWeight, Room
from fader_adapters.kernels.native.panels import PANEL
from fader_adapters.layers import Installed, Site
from fader_adapters.pauses import Pause
from fader_adapters.rounding import Keep, Rounding, directions, quantise
from fader_adapters.spec import Blend, Digest
from fader_adapters.weightspace.loss import LinearLoss, joined, measure
from fader_adapters.weightspace.plan import Form
from fader_adapters.weightspace.quantised import require_finite

Made = TypeVar("Made")
Make = Callable[[torch.Tensor, Keep | None], tuple[Made, torch.Tensor]]
"""Rows of W + Δ in fp32, and what is to be kept of Δ → the rows in their form, on the device, and
what they are now, in fp32."""

CHUNK = 1 << 14
"""Weights worked on at a time where that is not less than a panel: a fifth of a millisecond."""
GPU_CHUNK = 1 << 22
"""The same of weights on a GPU, where each chunk costs a copy there and back."""
_COPIES = 6 * 4
"""Bytes a weight of a chunk: its copies in fp32."""


def chunk_rows(width: int, device: torch.device) -> int:
    """Rows of `width` weights on `device` that are worked on at a time."""
    return max(PANEL, (GPU_CHUNK if device.type == "cuda" else CHUNK) // width)


def scratch_bytes(width: int, device: torch.device) -> int:
    """What one chunk takes beside the lane, at most."""
    return _COPIES * width * chunk_rows(width, device)


@dataclass(frozen=True, slots=True)
class LaneSpec:
    """What a lane is made of; two lanes with one key over one base have the same bits."""

    blend: Blend
    form: Form
    """nf4: requantised, at the base's speed; bf16: dense, in the activations' dtype."""
    rounding: Rounding

    @property
    def key(self) -> Digest:
        """sha256 over the blend, the form and the rounding."""
        rounding = self.rounding if self.form == "nf4" else ""
        told = f"fader-lane-1\0{self.blend.digest}\0{self.form}\0{rounding}"
        return Digest(hashlib.sha256(told.encode()).hexdigest())


def weight_dtype(
    base: BaseLinear | ExpertsWeight, form: Form, dtype: torch.dtype
) -> torch.dtype | None:
    """Of the merged weight, `dtype` being the activations'; None: NF4.

    An unquantised weight stays one in a lane of either form.
    """
    if base.plain_dtype is not None:
        return base.plain_dtype
    return None if form == "nf4" else dtype


class SiteWork:
    """One site on its way: chunks of rows in, one base linear out."""

    def __init__(
        self,
        site: Site,
        changes: Changes,
        spec: LaneSpec,
        installed: Installed,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.losses: list[LinearLoss] = []
        self._site = site
        self._base = site.kernel.base
        self._changes = changes
        self._spec = spec
        self._linears = installed.spec.linears
        self._dtype = dtype
        self._device = device

    def run(self, room: Room, pause: Pause, told: Callable[[int], None]) -> BaseLinear:
        """Merge all rows; `told` hears the weights of each chunk once it is done. Raises
        CheckpointInvalid (NaN or Inf)."""
        shape = (self._base.out_features, self._base.in_features)
        bias = self._bias()
        dtype = weight_dtype(self._base, self._spec.form, self._dtype)
        if dtype is None:
            keep = self._spec.rounding == "keep"
            make = partial(packed, self._device)
            return room.nf4(self._chunks(make, pause, told, keep=keep), shape, bias)
        place = room.head if self._site.head else room.plain
        return place(
            self._chunks(partial(rounded, dtype, self._device), pause, told), shape, bias
        )  # fmt: skip

    def _chunks(
        self,
        make: Make[Made],
        pause: Pause,
        told: Callable[[int], None],
        *,
        keep: bool = False,
    ) -> Iterator[Made]:
        begin = 0
        for linear, size in zip(self._site.spec.linears, self._site.spec.out_features, strict=True):
            width, path = self._base.in_features, self._linears[linear].path
            part = Part(self._base, begin, size, width, path, chunk_rows(width, self._device))
            lost: list[LinearLoss] = []
            change = self._changes.of(linear)
            yield from merged_rows(part, change, make, pause, told, lost, keep=keep)
            if lost:
                self.losses.append(joined(lost))
            begin += size

    def _bias(self) -> torch.Tensor | None:
        """The base's, unless a term adds to it; then in the activations' dtype."""
        site, own = self._site.spec, self._base.bias
        if not self._changes.biases().intersection(site.linears):
            return own
        sizes = zip(site.linears, site.out_features, strict=True)
        total = torch.cat([_added(self._changes.of(linear), size) for linear, size in sizes])
        if own is not None:
            total += own.float().cpu()
        return total.to(self._device, self._dtype)


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a weight that are one linear's, or one expert's of a stack."""

    weight: BaseLinear | ExpertsWeight
    first: int
    rows: int
    width: int
    path: str
    step: int
    """Rows worked on at a time."""


def merged_rows(
    part: Part,
    change: Change | None,
    make: Make[Made],
    pause: Pause,
    told: Callable[[int], None],
    lost: list[LinearLoss],
    *,
    keep: bool,
) -> Iterator[Made]:
    """The rows of W + Δ as `make` makes them, a chunk at a time; what each chunk lost goes to
    `lost`, `told` hears its weights once it is done. keep: see `rounding`."""
    basis = directions(change.delta.a) if change is not None and keep else None
    for start in range(0, part.rows, part.step):
        stop = min(start + part.step, part.rows)
        given = part.weight.rows(part.first + start, part.first + stop).cpu()
        wanted = given if change is None else change.of_weight(given, start)
        pause()
        kept = None if basis is None else Keep.of(basis, given, wanted)
        made, values = make(wanted, kept)
        yield made
        pause()
        if change is not None:
            lost.append(loss_of(part.path, change.delta.rank, given, wanted, values))
        pause()
        told(given.numel())


def packed(
    device: torch.device, wanted: torch.Tensor, kept: Keep | None
) -> tuple[nf4.Nf4Weight, torch.Tensor]:
    """Weights in NF4 on `device`, and what they are now, in fp32. Raises CheckpointInvalid (NaN or
    Inf)."""
    made = quantise(wanted, kept)
    return _moved(made, device), nf4.dense(made, torch.float32)


def rounded(
    dtype: torch.dtype, device: torch.device, wanted: torch.Tensor, kept: Keep | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in `dtype`; nothing is kept."""
    made = wanted.to(dtype)
    values = made.float()
    require_finite(values)
    return made.to(device), values


def _moved(weight: nf4.Nf4Weight, device: torch.device) -> nf4.Nf4Weight:
    if device.type == "cpu":
        return weight
    packed, absmax = weight.packed.to(device), weight.absmax.to(device)
    return nf4.Nf4Weight(packed, absmax, weight.out_features, weight.in_features)


def _added(change: Change | None, size: int) -> torch.Tensor:
    if change is None or change.bias is None:
        return torch.zeros(size)
    return change.bias


def loss_of(
    path: str, rank: int, given: torch.Tensor, wanted: torch.Tensor, made: torch.Tensor
) -> LinearLoss:
    """Of some rows: W, W + Δ and W', in fp32."""

    def before(start: int, stop: int) -> torch.Tensor:
        return given[start:stop]

    return measure(path, rank, wanted, before=before, served=before, after=lambda a, b: made[a:b])
