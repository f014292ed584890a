"""A second set of weights beside the base's: W merged with one blend, site by site.

Knows sites and kernels; nothing of requests. The base's own weights are only read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fader_adapters.changes import Changes
from fader_adapters.errors import BlendInvalid
from fader_adapters.expert_layers import Stack
from fader_adapters.kernels import native
from fader_adapters.kernels.backend import Backend, BaseLinear, ExpertsWeight
from fader_adapters.kernels.native.panels import PANEL
from fader_adapters.layers import Installed, Site
from fader_adapters.merged_site import LaneSpec, SiteWork, scratch_bytes, weight_dtype
from fader_adapters.merged_stack import StackWork
from fader_adapters.merged_table import TableWork
from fader_adapters.pauses import Pause
from fader_adapters.step_state import LaneWeights
from fader_adapters.weightspace.loss import LinearLoss, overall


@dataclass(frozen=True, eq=False)
class MergedLane:
    """Weights for all that a term touches; the rest runs the base's."""

    spec: LaneSpec
    weights: LaneWeights
    losses: tuple[LinearLoss, ...]
    """One an adapted linear, in base order."""

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
        """dtype: of the activations. Raises BlendInvalid when nothing would change."""
        self.spec = spec
        self._installed = installed
        self._backend = backend
        self._changes = changes
        self._dtype = dtype
        self._device = device
        touched = changes.linears()
        self._sites = [s for s in installed.every_site if touched.intersection(s.spec.linears)]
        self._stacks = [stack for index, stack in installed.stacks.items() if index in touched]
        linears = installed.spec.linears
        self._embedding = next((i for i in touched if linears[i].role == "embedding"), None)
        if not touched:
            raise BlendInvalid("the blend changes no linear of the base: there is nothing to merge")

    @property
    def weights(self) -> int:
        """Weights to work on: what progress is counted in."""
        linears = self._installed.spec.linears
        merged = [i for site in self._sites for i in site.spec.linears]
        merged += [stack.index for stack in self._stacks]
        if self._embedding is not None:
            merged.append(self._embedding)
        return sum(linears[i].weights for i in merged)

    @property
    def need(self) -> Need:
        """What the lane holds, and at most beside it while it is made."""
        own = [self._bytes(site) for site in self._sites]
        stacks = [self._stack_bytes(stack) for stack in self._stacks]
        one = [size // stack.spec.experts for stack, size in zip(self._stacks, stacks, strict=True)]
        scratch = max((*own, *one), default=0)
        widths = [site.spec.in_features for site in self._sites]
        own += stacks
        widths += [stack.spec.in_features for stack in self._stacks]
        if self._embedding is not None:
            linear, table = self._installed.spec.linears[self._embedding], self._installed.table
            assert table is not None
            own.append(linear.weights * table.plain_dtype.itemsize)
            widths.append(linear.out_features)
        factors = max(map(self._changes.factor_bytes, self._changes.linears()))
        chunk = max(scratch_bytes(width, self._device) for width in widths)
        return Need(sum(own), scratch + factors + chunk)

    def run(self, told: Callable[[int], None], pause: Pause) -> MergedLane:
        """Merge all that changes; `told` hears the weights done so far. On one thread, the
        caller's.

        Raises CheckpointInvalid when a merged weight is not finite, and whatever `pause` raises.
        """
        room = self._backend.room()
        bases: dict[Site, BaseLinear] = {}
        losses: list[LinearLoss] = []
        table = None
        done = 0

        def count(weights: int) -> None:
            nonlocal done
            done += weights
            told(done)

        with native.alone(), torch.inference_mode():
            for site in self._sites:
                work = self._site_work(site)
                bases[site] = work.run(room, pause, count)
                losses += work.losses
            stacks: dict[int, ExpertsWeight] = {}
            for stack in self._stacks:
                experts = self._stack_work(stack)
                stacks[stack.index] = experts.run(room, pause, count)
                losses.append(experts.loss)
            if self._embedding is not None:
                rows = self._table_work(self._embedding)
                table = rows.run(pause, count)
                losses.append(rows.loss)
        places = {linear.path: i for i, linear in enumerate(self._installed.spec.linears)}
        losses.sort(key=lambda loss: places[loss.path])
        return MergedLane(self.spec, LaneWeights(bases, table, stacks), tuple(losses))

    def _site_work(self, site: Site) -> SiteWork:
        return SiteWork(
            site,
            self._changes,
            self.spec,
            self._installed,
            dtype=self._dtype,
            device=self._device,
        )

    def _stack_work(self, stack: Stack) -> StackWork:
        return StackWork(stack, self._changes, self.spec, dtype=self._dtype, device=self._device)

    def _table_work(self, linear: int) -> TableWork:
        table, change = self._installed.table, self._changes.of(linear)
        assert table is not None
        assert change is not None
        spec = self._installed.spec.linears[linear]
        return TableWork(table, spec, change, device=self._device)

    def _bytes(self, site: Site) -> int:
        base = site.kernel.base
        dtype = weight_dtype(base, self.spec.form, self._dtype)
        if dtype is None:
            return base.nbytes
        rows = -(-sum(site.spec.out_features) // PANEL) * PANEL
        return rows * site.spec.in_features * dtype.itemsize

    def _stack_bytes(self, stack: Stack) -> int:
        dtype = weight_dtype(stack.weight, self.spec.form, self._dtype)
        return stack.weight.nbytes if dtype is None else stack.spec.weights * dtype.itemsize
