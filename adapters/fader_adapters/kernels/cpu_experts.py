"""Stacks of experts on the native backend: their weights in panels, and their deltas, for which a
pair of slot and expert is a slot.

A row of the kernel is a token at one of its experts; what it wears is its request's blend, at that
expert's matrices. Knows the C library, not models.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import torch

from fader_adapters.kernels.native import (
    ExpertPanels,
    Nf4Panels,
    PanelStore,
    PlainPanels,
    Site,
    SiteTables,
    StepPlan,
    Tape,
    Workspace,
    alone,
    gemm,
)
from fader_adapters.kernels.native.checks import FLOATS
from fader_adapters.kernels.native.panels import PANEL
from fader_adapters.kernels.nf4 import Nf4Weight
from fader_adapters.kernels.nf4_stack import Nf4Stack
from fader_adapters.kernels.routing import Routing
from fader_adapters.kernels.stack_weights import StackWeight, filled_stack
from fader_adapters.kernels.tables import Tables
from fader_adapters.spec import SiteSpec


def views(tables: Tables, own: slice, columns: Sequence[tuple[int, int]]) -> SiteTables:
    """The columns of the tables that are one site's."""
    return SiteTables(
        tables.arena,
        tables.a_offset[:, own],
        tables.b_offset[:, own],
        tables.rank[:, own],
        tables.scale[:, own],
        columns,
        gain_off=tables.gain_offset[:, own],
        bias_off=tables.bias_offset[:, own],
    )


class PanelStack:
    """A stack's weights in panels."""

    def __init__(self, panels: ExpertPanels, bias: torch.Tensor | None) -> None:
        self.bias = bias
        self._own = panels
        self.panels = panels.panels

    @staticmethod
    def of(
        matrices: Iterable[torch.Tensor],
        shape: tuple[int, int, int],
        bias: torch.Tensor | None,
        *,
        store: PanelStore,
        scratch: Workspace,
        tape: Tape,
    ) -> "PanelStack | StackWeight":
        """A copy of the contiguous matrices [out, in], shape (experts, out, in); plain where the
        kernel does not take such."""
        parts = iter(matrices)
        first = next(parts)
        parts = chain([first], parts)
        if not ExpertPanels.fits(*shape[1:]) or first.dtype not in FLOATS:
            return filled_stack(parts, shape, bias)
        experts, out, width = shape
        panels = PlainPanels.blank(experts * out, width, first.dtype, store=store)
        panels.fill(parts)
        own = ExpertPanels(panels, experts, bias=bias, workspace=scratch, tape=tape)
        return PanelStack(own, bias)

    @staticmethod
    def of_nf4(
        rows: Iterable[Nf4Weight],
        shape: tuple[int, int, int],
        bias: torch.Tensor | None,
        *,
        store: PanelStore,
        scratch: Workspace,
        tape: Tape,
    ) -> "PanelStack | Nf4Stack":
        """The same in NF4, of rows of [experts · out, in], some at a time."""
        experts, out, width = shape
        if not ExpertPanels.fits(out, width):
            return Nf4Stack.of(rows, shape, bias)
        panels = Nf4Panels.blank(experts * out, width, store=store)
        panels.fill((part.packed, part.absmax, part.out_features) for part in rows)
        own = ExpertPanels(panels, experts, bias=bias, workspace=scratch, tape=tape)
        return PanelStack(own, bias)

    @property
    def plain_dtype(self) -> torch.dtype | None:
        return None if isinstance(self.panels, Nf4Panels) else self.panels.dtype

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    @property
    def resident(self) -> tuple[torch.Tensor, ...]:
        panels = self.panels
        if isinstance(panels, Nf4Panels):
            return panels.panels, panels.scales
        return (panels.panels,)

    def grouped(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        return self._own(x, routing.ends)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        first = start // PANEL * PANEL
        with alone():
            return self.panels.rows(first, stop).dense(torch.float32)[start - first :]

    def product(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        first = start // PANEL * PANEL
        with alone():
            return gemm(x, self.panels.rows(first, stop))[:, start - first :]


@dataclass(frozen=True, eq=False, slots=True)
class Worn:
    """The blends of a step's rows as arrays: row r has terms starts[r] to starts[r + 1]."""

    active: tuple[int, ...]
    """Slots in use, ascending."""
    starts: np.ndarray
    """[rows + 1] int64"""
    place: np.ndarray
    """[terms] int64, into `active`."""
    gamma: np.ndarray
    """[terms] float32"""
    row: np.ndarray
    """[tokens] int64"""

    @staticmethod
    def of(step: StepPlan) -> "Worn":
        flat = [term for blend in step.blends for term in blend]
        active = tuple(sorted({slot for slot, _ in flat}))
        places = {slot: i for i, slot in enumerate(active)}
        return Worn(
            active,
            np.cumsum([0, *map(len, step.blends)]),
            np.array([places[slot] for slot, _ in flat], np.int64),
            np.array([gamma for _, gamma in flat], np.float32),
            np.array(step.row_of_token, np.int64),
        )

    def at_experts(self, routing: Routing) -> StepPlan:
        """The plan of the pairs; its slots are those of `active` times the experts."""
        token, expert_of = routing.token.numpy(), routing.expert.numpy()
        keys = self.row[token] * routing.experts + expert_of
        distinct, row_of_pair = np.unique(keys, return_inverse=True)
        row, expert = np.divmod(distinct, routing.experts)
        first, counts = self.starts[row], self.starts[row + 1] - self.starts[row]
        ends = np.concatenate(([0], np.cumsum(counts)))
        of_row = np.repeat(np.arange(len(row)), counts)
        term = first[of_row] + np.arange(len(of_row)) - ends[of_row]
        slot = self.place[term] * routing.experts + expert[of_row]
        return StepPlan(
            torch.from_numpy(ends.astype(np.int32)),
            torch.from_numpy(slot.astype(np.int32)),
            torch.from_numpy(self.gamma[term]),
            torch.from_numpy(row_of_pair.astype(np.int32)),
            slots=len(self.active) * routing.experts,
        )


class PairPlans:
    """What was worked out for the step and the routing that run now, for all who ask."""

    def __init__(self) -> None:
        self.worn = lru_cache(maxsize=4)(Worn.of)
        self._last: tuple[Worn, np.ndarray, np.ndarray, StepPlan] | None = None

    def of(self, worn: Worn, routing: Routing) -> StepPlan:
        """The plan of the pairs, made once for the stacks of one mixture."""
        token, expert = routing.token.numpy(), routing.expert.numpy()
        if self._last is not None:
            whose, tokens, experts, plan = self._last
            same = whose is worn and np.array_equal(experts, expert)
            if same and np.array_equal(tokens, token):
                return plan
        plan = worn.at_experts(routing)
        self._last = worn, token.copy(), expert.copy(), plan
        return plan


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
        """Read deltas from these tables from now on; again whenever they grew."""
        self._tables, self._bound = tables, None
        if self._experts == 1:
            own = slice(self._index, self._index + 1)
            self._site.bind(views(tables, own, ((0, self._out),)))

    def __call__(
        self, y: torch.Tensor, x: torch.Tensor, routing: Routing, step: object | None
    ) -> torch.Tensor:
        if step is None:
            return y
        assert isinstance(step, StepPlan)
        worn = self._plans.worn(step)
        if not self._touched(worn.active):
            return y
        plan = step if self._experts == 1 else self._plans.of(worn, routing)
        return self._site(x, plan, out=y.float()).to(y.dtype)

    def _touched(self, active: tuple[int, ...]) -> bool:
        """Whether a slot in use changes this stack; then the kernel knows where, afterwards."""
        tables = self._tables
        assert tables is not None
        rank = tables.rank[list(active), self._index]
        if not bool(rank.any()):
            return False
        if self._experts == 1:
            return True
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
