"""A second set of weights beside the base's: W merged with one blend, site by site.

Knows sites and kernels; nothing of requests. The base's own weights are only read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fader_adapters.changes import Changes
from fader_adapters.errors import BlendInvalid
from fader_adapters.kernels import native
from fader_adapters.kernels.backend import Backend, BaseLinear
from fader_adapters.kernels.native.panels import PANEL
from fader_adapters.layers import Installed, Site
from fader_adapters.merged_site import LaneSpec, SiteWork, is_plain, scratch_bytes
from fader_adapters.pauses import Pause
from fader_adapters.weightspace.loss import LinearLoss, overall


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
        """dtype: of the activations. Raises BlendInvalid when no linear would change, or the output
        head or the embedding would: a lane shares the base's."""
        self.spec = spec
        self._installed = installed
        self._backend = backend
        self._changes = changes
        self._dtype = dtype
        self._device = device
        touched = changes.linears()
        ends = [i for i in sorted(touched) if not installed.spec.linears[i].inside]
        if ends:
            paths = ", ".join(installed.spec.linears[i].path for i in ends)
            raise BlendInvalid(
                f"the blend adapts {paths}, and a merged lane shares these with the base (they are "
                "not in 4 bits, and may be one weight): serve it unmerged, or merge it offline"
            )
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
        scratch = max(scratch_bytes(site.spec.in_features) for site in self._sites)
        return Need(sum(own), max(own) + scratch)

    def run(self, told: Callable[[int], None], pause: Pause) -> MergedLane:
        """Merge every site; `told` hears the weights done so far. On one thread, the caller's.

        Raises AdapterInvalid when a merged weight is not finite, and whatever `pause` raises.
        """
        room = self._backend.room()
        bases: dict[Site, BaseLinear] = {}
        losses: list[LinearLoss] = []
        done = 0
        with native.alone(), torch.inference_mode():
            for site in self._sites:
                work = SiteWork(
                    site,
                    self._changes,
                    self.spec,
                    self._installed,
                    dtype=self._dtype,
                    device=self._device,
                )
                for count in work.chunks(pause):
                    done += count
                    told(done)
                bases[site] = work.finish(room)
                losses += work.losses
        return MergedLane(self.spec, bases, tuple(losses))

    def _bytes(self, site: Site) -> int:
        if self.spec.form == "nf4" and not is_plain(site.kernel.base):
            return site.kernel.base.nbytes
        rows = -(-sum(site.spec.out_features) // PANEL) * PANEL
        return rows * site.spec.in_features * self._dtype.itemsize


def _size(site: Site) -> int:
    return site.spec.in_features * sum(site.spec.out_features)
