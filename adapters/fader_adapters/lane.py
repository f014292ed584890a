"""A second set of weights beside the base's: W merged with one blend, site by site.

Knows sites and kernels; nothing of requests. The base's own weights are only read.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fader_adapters.changes import Changes
from fader_adapters.errors import BlendInvalid
from fader_adapters.kernels import native, nf4
from fader_adapters.kernels.backend import Backend, BaseLinear, Room
from fader_adapters.kernels.dense import DenseLinear
from fader_adapters.layers import Installed, Site
from fader_adapters.rounding import Rounding, directions, quantise
from fader_adapters.spec import Blend, Digest
from fader_adapters.weightspace.loss import LinearLoss, joined, measure, overall
from fader_adapters.weightspace.plan import Form

CHUNK = 1 << 19
"""Weights worked on at a time: a few milliseconds, and the whole of the scratch memory."""
_SCRATCH = 6 * 4 * CHUNK
"""Bytes of fp32 copies of one chunk."""

Pace = Callable[[float], None]
"""Called between chunks with the seconds the last one took; may sleep, or raise to give up."""


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


@dataclass(frozen=True, eq=False)
class MergedLane:
    """Weights for every site that a term touches; the others run the base's."""

    spec: LaneSpec
    bases: Mapping[Site, BaseLinear]
    losses: tuple[LinearLoss, ...]
    """One an adapted linear, in base order."""

    @property
    def nbytes(self) -> int:
        """Resident bytes beside the base's."""
        return sum(base.nbytes for base in self.bases.values())

    @property
    def report(self) -> dict[str, Any]:
        """What rounding costs: all linears together, and each."""
        return {
            "overall": overall(self.losses),
            "linears": [loss.document() for loss in self.losses],
        }


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of memory, before anything is allocated."""

    lane: int
    scratch: int

    @property
    def total(self) -> int:
        return self.lane + self.scratch


class Merger:
    """Makes one lane. Construct it to check and to count, then `run` it on a thread of its own."""

    def __init__(
        self,
        installed: Installed,
        backend: Backend,
        changes: Changes,
        spec: LaneSpec,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """dtype: of the activations. Raises BlendInvalid when no linear would change."""
        self.spec = spec
        self._installed = installed
        self._backend = backend
        self._changes = changes
        self._dtype = dtype
        self._device = device
        touched = changes.linears()
        self._sites = [s for s in installed.sites if touched.intersection(s.spec.linears)]
        if not self._sites:
            raise BlendInvalid("the blend changes no linear of the base: there is nothing to merge")

    @property
    def weights(self) -> int:
        """Weights to work on: what progress is counted in."""
        return sum(_size(site) for site in self._sites)

    @property
    def need(self) -> Need:
        """What the lane holds, and at most beside it while it is made."""
        own = [self._bytes(site) for site in self._sites]
        packed = max(own) if self.spec.form == "nf4" else 0
        return Need(sum(own), packed + _SCRATCH)

    def run(self, told: Callable[[int], None], pace: Pace) -> MergedLane:
        """Merge every site; `told` hears the weights done so far. On one thread, the caller's.

        Raises AdapterInvalid when a merged weight is not finite, and whatever `pace` raises.
        """
        room = self._backend.room(self._device)
        bases: dict[Site, BaseLinear] = {}
        losses: list[LinearLoss] = []
        done = 0
        with native.alone(), torch.inference_mode():
            for site in self._sites:
                work = _SiteWork(site, self._changes, self.spec, self._installed, self._dtype)
                for count in work.chunks(room, pace):
                    done += count
                    told(done)
                bases[site] = work.finish(room)
                losses += work.losses
        return MergedLane(self.spec, bases, tuple(losses))

    def _bytes(self, site: Site) -> int:
        if self.spec.form == "nf4" and not isinstance(site.kernel.base, DenseLinear):
            return site.kernel.base.nbytes
        return _size(site) * self._dtype.itemsize


class _SiteWork:
    """One site on its way: chunks of rows in, one base linear out."""

    def __init__(
        self,
        site: Site,
        changes: Changes,
        spec: LaneSpec,
        installed: Installed,
        dtype: torch.dtype,
    ) -> None:
        self.losses: list[LinearLoss] = []
        self._site = site
        self._base = site.kernel.base
        self._changes = changes
        self._spec = spec
        self._linears = installed.spec.linears
        self._dtype = dtype
        self._packs = spec.form == "nf4" and not isinstance(self._base, DenseLinear)
        self._packed: list[nf4.Nf4Weight] = []
        self._plain = torch.empty(0)

    def chunks(self, room: Room, pace: Pace) -> Iterator[int]:
        """Work through the rows; yields the weights of each chunk once it is done."""
        out, width = self._base.out_features, self._base.in_features
        if not self._packs:
            self._plain = room.empty(out, width, self._dtype)
        step = max(1, CHUNK // width)
        begin = 0
        for linear, size in zip(self._site.spec.linears, self._site.spec.out_features, strict=True):
            delta = self._changes.sum(linear)
            kept = None
            if delta is not None and self._packs and self._spec.rounding == "keep":
                kept = directions(delta.a)
            parts: list[LinearLoss] = []
            for start in range(begin, begin + size, step):
                began = time.perf_counter()
                stop = min(start + step, begin + size)
                given = self._base.rows(start, stop)
                wanted = given.clone()
                if delta is not None:
                    wanted.addmm_(delta.b[start - begin : stop - begin], delta.a)
                made = self._round(wanted, start, kept)
                if delta is not None:
                    parts.append(_loss(self._linears[linear].path, delta.rank, given, wanted, made))
                pace(time.perf_counter() - began)
                yield (stop - start) * width
            if parts:
                self.losses.append(joined(parts))
            begin += size

    def _round(self, wanted: torch.Tensor, start: int, kept: torch.Tensor | None) -> torch.Tensor:
        """Keep the rows in their form; returns what they are now, in fp32."""
        if self._packs:
            packed = quantise(wanted, kept)
            self._packed.append(packed)
            return nf4.dense(packed, torch.float32)
        rounded = wanted.to(self._dtype)
        self._plain[start : start + len(rounded)] = rounded
        return rounded.float()

    def finish(self, room: Room) -> BaseLinear:
        """All rows as one base linear."""
        if self._packs:
            return room.nf4([nf4.stack(self._packed)], self._base.bias)
        return room.plain(self._plain, self._base.bias)


def _loss(
    path: str, rank: int, given: torch.Tensor, wanted: torch.Tensor, made: torch.Tensor
) -> LinearLoss:
    def before(start: int, stop: int) -> torch.Tensor:
        return given[start:stop]

    return measure(path, rank, wanted, before=before, served=before, after=lambda a, b: made[a:b])


def _size(site: Site) -> int:
    return site.spec.in_features * sum(site.spec.out_features)
