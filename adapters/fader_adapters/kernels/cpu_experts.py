"""Deltas of a stack of experts on the native backend: a pair of slot and expert is a slot there.

A row of the kernel is a token at one of its experts; what it wears is its request's blend, at that
expert's matrices. Knows the C library, not models.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from fader_adapters.kernels.native import Site, SiteTables, StepPlan, Workspace
from fader_adapters.kernels.routing import Routing
from fader_adapters.kernels.tables import Tables
from fader_adapters.spec import SiteSpec


@dataclass(frozen=True, eq=False, slots=True)
class Worn:
    """The blends of a step's rows as arrays: row r has terms starts[r] to starts[r + 1]."""

    active: tuple[int, ...]
    """Slots in use, ascending."""
    starts: torch.Tensor
    """[rows + 1] int64"""
    place: torch.Tensor
    """[terms] int64, into `active`."""
    gamma: torch.Tensor
    """[terms] float32"""
    row: torch.Tensor
    """[tokens] int64"""

    @staticmethod
    def of(step: StepPlan) -> "Worn":
        flat = [term for blend in step.blends for term in blend]
        active = tuple(sorted({slot for slot, _ in flat}))
        places = {slot: i for i, slot in enumerate(active)}
        counts = torch.tensor([0, *map(len, step.blends)])
        return Worn(
            active,
            counts.cumsum(0),
            torch.tensor([places[slot] for slot, _ in flat], dtype=torch.int64),
            torch.tensor([gamma for _, gamma in flat], dtype=torch.float32),
            torch.tensor(step.row_of_token),
        )

    def at_experts(self, routing: Routing) -> StepPlan:
        """The plan of the pairs; its slots are those of `active` times the experts."""
        keys = self.row[routing.token] * routing.experts + routing.expert
        distinct, row_of_pair = torch.unique(keys, return_inverse=True)
        row, expert = distinct // routing.experts, distinct % routing.experts
        first, counts = self.starts[row], self.starts[row + 1] - self.starts[row]
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        of_row = torch.repeat_interleave(torch.arange(len(row)), counts)
        term = first[of_row] + torch.arange(len(of_row)) - ends[of_row]
        return StepPlan(
            ends.to(torch.int32),
            (self.place[term] * routing.experts + expert[of_row]).to(torch.int32),
            self.gamma[term],
            row_of_pair.to(torch.int32),
            slots=len(self.active) * routing.experts,
        )


class PairPlans:
    """What was worked out for the step and the routing that run now, for all who ask."""

    def __init__(self) -> None:
        self.worn = lru_cache(maxsize=4)(Worn.of)
        self.of = lru_cache(maxsize=1)(lambda worn, routing: worn.at_experts(routing))


class NativeStack:
    """One stack."""

    def __init__(
        self, site: SiteSpec, experts: int, *, plans: PairPlans, scratch: Workspace
    ) -> None:
        (self._index,), (self._out,) = site.linears, site.out_features
        self._width, self._experts = site.in_features, experts
        self._plans = plans
        self._site = Site(None, shape=(self._out, self._width), workspace=scratch)
        self._tables: Tables | None = None
        self._bound: tuple[int, tuple[int, ...]] | None = None

    def bind(self, tables: Tables) -> None:
        """Read deltas from these tables from now on."""
        self._tables, self._bound = tables, None

    def __call__(
        self, y: torch.Tensor, x: torch.Tensor, routing: Routing, step: object | None
    ) -> torch.Tensor:
        if step is None:
            return y
        assert isinstance(step, StepPlan)
        worn = self._plans.worn(step)
        if not self._touched(worn.active):
            return y
        plan = self._plans.of(worn, routing)
        return self._site(x, plan, out=y.float()).to(y.dtype)

    def _touched(self, active: tuple[int, ...]) -> bool:
        """Whether a slot in use changes this stack; then the kernel knows where, afterwards."""
        tables = self._tables
        assert tables is not None
        rank = tables.rank[list(active), self._index]
        if not bool(rank.any()):
            return False
        key = (tables.generation, active)
        if self._bound != key:
            self._site.bind(self._views(tables, list(active), rank.long()))
            self._bound = key
        return True

    def _views(self, tables: Tables, active: list[int], rank: torch.Tensor) -> SiteTables:
        expert = torch.arange(self._experts)

        def places(offset: torch.Tensor, width: int) -> torch.Tensor:
            first = offset[active, self._index, None]
            spread = first + expert * (rank * width)[:, None]
            return torch.where(first < 0, first, spread).view(-1, 1)

        def each(values: torch.Tensor) -> torch.Tensor:
            return values[active, self._index].repeat_interleave(self._experts).view(-1, 1)

        return SiteTables(
            tables.arena,
            places(tables.a_offset, self._width),
            places(tables.b_offset, self._out),
            each(tables.rank),
            each(tables.scale),
            ((0, self._out),),
        )
