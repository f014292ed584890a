"""The native CPU backend: NF4 panels and one call a site. Knows the C library, not models."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch

from fader_adapters.kernels.cpu_experts import NativeStack, PairPlans, PanelStack, views
from fader_adapters.kernels.dense import DenseLinear, filled
from fader_adapters.kernels.native import (
    ExpertPanels,
    Lookup,
    NativeStates,
    Nf4Panels,
    PanelStore,
    PlainPanels,
    Screen,
    Site,
    StepPlan,
    Tape,
    Workspace,
    alone,
    gemm,
)
from fader_adapters.kernels.native.panels import PANEL
from fader_adapters.kernels.nf4 import BLOCK, Nf4Weight
from fader_adapters.kernels.nf4_stack import Nf4Stack
from fader_adapters.kernels.stack_weights import StackWeight
from fader_adapters.kernels.tables import Tables
from fader_adapters.spec import SiteSpec, StepTerms

if TYPE_CHECKING:
    from fader_adapters.kernels.backend import BaseLinear


class PanelLinear:
    """A weight in column panels; an NF4 one is resident at 0.5625 byte a weight."""

    def __init__(
        self,
        panels: Nf4Panels | PlainPanels,
        bias: torch.Tensor | None,
        *,
        scratch: Workspace,
        tape: Tape,
    ) -> None:
        self.panels = panels
        self.bias = bias
        self.out_features = panels.n
        self.in_features = panels.k
        self.site = Site(panels, bias=bias, workspace=scratch, tape=tape)

    @property
    def plain_dtype(self) -> torch.dtype | None:
        return self.panels.dtype if isinstance(self.panels, PlainPanels) else None

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.site(x)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.panels.dense(dtype)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        first = start // PANEL * PANEL
        with alone():
            return self.panels.rows(first, stop).dense(torch.float32)[start - first :]

    def product(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        first = start // PANEL * PANEL
        with alone():
            return gemm(x, self.panels.rows(first, stop))[:, start - first :]


class PanelHead(PanelLinear):
    """The output head's plain weight: fp32 logits."""

    def __call__(self, x: torch.Tensor, step: StepPlan | None = None) -> torch.Tensor:
        logits = torch.empty(x.shape[0], self.out_features, dtype=torch.float32)
        return self.site(x, step, out=logits)


def in_place_of(
    pairs: Iterable[tuple["BaseLinear", "BaseLinear"]],
) -> dict[int, Site] | None:
    """For (base, merged) linears: the sites to call in recorded steps, by the addresses of those
    that were. None where one of them is not made of panels."""
    sites: dict[int, Site] = {}
    for base, merged in pairs:
        if not isinstance(base, PanelLinear) or not isinstance(merged, PanelLinear):
            return None
        sites[base.site.address] = merged.site
    return sites


class NativeRoom:
    """Panels and plain weights in huge pages of their own."""

    def __init__(self, *, scratch: Workspace, tape: Tape) -> None:
        self._store = PanelStore()
        self._scratch = scratch
        self._tape = tape

    def plain(
        self, rows: Iterable[torch.Tensor], shape: tuple[int, int], bias: torch.Tensor | None
    ) -> "BaseLinear":
        return self._plain(PanelLinear, rows, shape, bias)

    def head(
        self, rows: Iterable[torch.Tensor], shape: tuple[int, int], bias: torch.Tensor | None
    ) -> "BaseLinear":
        return self._plain(PanelHead, rows, shape, bias)

    def _plain(
        self,
        kind: type[PanelLinear],
        rows: Iterable[torch.Tensor],
        shape: tuple[int, int],
        bias: torch.Tensor | None,
    ) -> "BaseLinear":
        if shape[1] % BLOCK:
            return DenseLinear(filled(rows, shape), bias)
        parts = iter(rows)
        first = next(parts)
        panels = PlainPanels.blank(*shape, first.dtype, store=self._store)
        panels.fill(chain([first], parts))
        return kind(panels, bias, scratch=self._scratch, tape=self._tape)

    def nf4(
        self, rows: Iterable[Nf4Weight], shape: tuple[int, int], bias: torch.Tensor | None
    ) -> PanelLinear:
        panels = Nf4Panels.blank(*shape, store=self._store)
        panels.fill((w.packed, w.absmax, w.out_features) for w in rows)
        return PanelLinear(panels, bias, scratch=self._scratch, tape=self._tape)

    def stack(
        self,
        matrices: Iterable[torch.Tensor],
        shape: tuple[int, int, int],
        bias: torch.Tensor | None,
    ) -> "PanelStack | StackWeight":
        return PanelStack.of(
            matrices, shape, bias, store=self._store, scratch=self._scratch, tape=self._tape
        )

    def nf4_stack(
        self, rows: Iterable[Nf4Weight], shape: tuple[int, int, int], bias: torch.Tensor | None
    ) -> "PanelStack | Nf4Stack":
        return PanelStack.of_nf4(
            rows, shape, bias, store=self._store, scratch=self._scratch, tape=self._tape
        )


class NativeSite:
    """One site. Over panels, base and deltas are one call, summed in fp32 and rounded once; over
    another base the deltas are added to its output in fp32."""

    def __init__(
        self, site: SiteSpec, base: "BaseLinear", *, scratch: Workspace, tape: Tape
    ) -> None:
        self.base = base
        self._tape = tape
        self._first = site.linears[0]
        self._members = len(site.linears)
        ends = [sum(site.out_features[: i + 1]) for i in range(self._members)]
        self._columns = tuple(zip([0, *ends], ends, strict=False))
        shape = (base.out_features, base.in_features)
        own = isinstance(base, PanelLinear)
        self._site = (
            base.site
            if own
            else Site(None, bias=base.bias, shape=shape, workspace=scratch, tape=tape)
        )

    def bind(self, tables: Tables) -> None:
        """Take the tables' pointers; again whenever the tables grew."""
        self._site.bind(
            views(tables, slice(self._first, self._first + self._members), self._columns)
        )

    def __call__(self, x: torch.Tensor, step: object | None) -> torch.Tensor:
        assert step is None or isinstance(step, StepPlan)
        if self._site.has_base:
            return self._site(x, step)
        if step is None and not self._tape.recording:
            return self.base(x)
        return self._site(x, step, out=self.base(x).float()).to(x.dtype)


class NativeHead:
    """The output head's site over plain panels: fp32 logits, deltas included."""

    def __init__(self, site: SiteSpec, base: PanelHead) -> None:
        self.base: BaseLinear = base
        self.panels = base.panels
        self._head = base
        (self._index,) = site.linears

    def screened(self) -> Screen | None:
        """What may be left out of its outputs from now on; None where a weight is not finite."""
        assert isinstance(self.panels, PlainPanels)
        screen = Screen.of(self.panels)
        if screen is not None:
            self._head.site.leave_out(screen)
        return screen

    def bind(self, tables: Tables) -> None:
        own = slice(self._index, self._index + 1)
        self._head.site.bind(views(tables, own, ((0, self._head.out_features),)))

    def __call__(self, x: torch.Tensor, step: object | None) -> torch.Tensor:
        assert step is None or isinstance(step, StepPlan)
        return self._head(x, step)


class NativeLookup:
    """The delta of one embedding."""

    def __init__(self, site: SiteSpec, *, scratch: Workspace, tape: Tape) -> None:
        (self._index,), (self._width,) = site.linears, site.out_features
        self._lookup = Lookup((self._width, site.in_features), workspace=scratch, tape=tape)
        self._tape = tape

    def bind(self, tables: Tables) -> None:
        own = slice(self._index, self._index + 1)
        self._lookup.bind(views(tables, own, ((0, self._width),)))

    def __call__(self, y: torch.Tensor, ids: torch.Tensor, step: object | None) -> None:
        if step is not None or self._tape.recording:
            assert step is None or isinstance(step, StepPlan)
            self._lookup.add(y, ids, step)


class NativeBackend:
    """fp32 and bf16 on any x86-64, with the widest instructions the machine has."""

    name = "native"
    together: int | None = None

    def __init__(self) -> None:
        self._store = PanelStore()
        self._scratch = Workspace()
        self.tape = Tape()
        self._pairs = PairPlans()
        self._sites: list[NativeSite | NativeHead | NativeLookup | NativeStack] = []
        self._ranks: torch.Tensor | None = None

    def linear(self, weights: Sequence[Nf4Weight], bias: torch.Tensor | None) -> PanelLinear:
        parts = [(w.packed, w.absmax, w.out_features) for w in weights]
        panels = Nf4Panels.stack(parts, weights[0].in_features, store=self._store)
        return PanelLinear(panels, bias, scratch=self._scratch, tape=self.tape)

    def room(self) -> NativeRoom:
        return NativeRoom(scratch=self._scratch, tape=self.tape)

    def bind(self, site: SiteSpec, base: "BaseLinear") -> NativeSite:
        """The members' indices must follow one another."""
        kernel = NativeSite(site, base, scratch=self._scratch, tape=self.tape)
        self._sites.append(kernel)
        return kernel

    def bind_head(
        self, site: SiteSpec, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> NativeHead:
        """The output head for servers, which want few rows of logits a step, over a copy of its
        weight [n, k], k % 64 == 0, of x's dtype."""
        panels = PlainPanels.pack(weight.contiguous(), store=self._store)
        base = PanelHead(panels, bias, scratch=self._scratch, tape=self.tape)
        kernel = NativeHead(site, base)
        self._sites.append(kernel)
        return kernel

    def bind_lookup(self, site: SiteSpec) -> NativeLookup:
        kernel = NativeLookup(site, scratch=self._scratch, tape=self.tape)
        self._sites.append(kernel)
        return kernel

    def states(self) -> NativeStates:
        return NativeStates(self.tape)

    def router(self) -> None:
        return None

    def bind_stack(self, site: SiteSpec, experts: int) -> NativeStack:
        kernel = NativeStack(site, experts, plans=self._pairs, scratch=self._scratch)
        self._sites.append(kernel)
        return kernel

    def pack_stack(self, weight: StackWeight | Nf4Stack) -> "PanelStack | StackWeight | Nf4Stack":
        bias = None if weight.bias is None else weight.bias.data
        packed = isinstance(weight, Nf4Stack)
        experts, out, width = weight.shape if packed else weight.values.shape
        if not ExpertPanels.fits(out, width):
            return weight
        place = {"store": self._store, "scratch": self._scratch, "tape": self.tape}
        if packed:
            matrices = map(weight.matrix, range(experts))
            return PanelStack.of_nf4(matrices, weight.shape, bias, **place)
        dense = (matrix.contiguous() for matrix in weight.values)
        return PanelStack.of(dense, (experts, out, width), bias, **place)

    def prepare(self, tables: Tables, terms: StepTerms) -> StepPlan | None:
        if terms.idle:
            return None
        if tables.rank is not self._ranks:
            for site in self._sites:
                site.bind(tables)
            self._ranks = tables.rank
        row_of_token: list[int] = []
        for i, row in enumerate(terms.rows):
            row_of_token += [i] * row.tokens
        blends = [list(row.terms) for row in terms.rows]
        return StepPlan.of(blends, row_of_token, slots=tables.slots)
