"""The native CPU backend: NF4 panels and one call a site. Knows the C library, not models."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fader_adapters.kernels.native import (
    Nf4Panels,
    PanelStore,
    Site,
    SiteTables,
    StepPlan,
    Workspace,
)
from fader_adapters.kernels.nf4 import Nf4Weight
from fader_adapters.kernels.tables import Tables
from fader_adapters.spec import SiteSpec, StepTerms

if TYPE_CHECKING:
    from fader_adapters.kernels.backend import BaseLinear


class PanelLinear:
    """An NF4 weight repacked into column panels; resident at 0.5625 byte a weight."""

    def __init__(self, panels: Nf4Panels, bias: torch.Tensor | None, scratch: Workspace) -> None:
        self.panels = panels
        self.bias = bias
        self.out_features = panels.n
        self.in_features = panels.k
        self._site = Site(panels, bias=bias, workspace=scratch)

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._site(x)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.panels.dense(dtype)


class NativeSite:
    """One site. Over panels, base and deltas are one call, summed in fp32 and rounded once; over
    another base the deltas are added to its output in fp32."""

    def __init__(self, site: SiteSpec, base: "BaseLinear", scratch: Workspace) -> None:
        self.base = base
        self._scratch = scratch
        self._first = site.linears[0]
        self._members = len(site.linears)
        ends = [sum(site.out_features[: i + 1]) for i in range(self._members)]
        self._columns = tuple(zip([0, *ends], ends, strict=False))
        self._bound: Site | None = None

    def bind(self, tables: Tables) -> None:
        """Take the tables' pointers; again whenever the tables grew."""
        own = slice(self._first, self._first + self._members)
        views = SiteTables(
            tables.arena,
            tables.a_offset[:, own],
            tables.b_offset[:, own],
            tables.rank[:, own],
            tables.scale[:, own],
            self._columns,
        )
        base = self.base
        panels, bias = (base.panels, base.bias) if isinstance(base, PanelLinear) else (None, None)
        shape = (base.out_features, base.in_features)
        self._bound = Site(panels, views, bias=bias, shape=shape, workspace=self._scratch)

    def __call__(self, x: torch.Tensor, step: object | None) -> torch.Tensor:
        if step is None:
            return self.base(x)
        assert isinstance(step, StepPlan)
        assert self._bound is not None
        if self._bound.has_base:
            return self._bound(x, step)
        return self._bound(x, step, out=self.base(x).float()).to(x.dtype)


class NativeBackend:
    """fp32 and bf16 on any x86-64, with the widest instructions the machine has."""

    name = "native"
    least_rows = 1

    def __init__(self) -> None:
        self._store = PanelStore()
        self._scratch = Workspace()
        self._sites: list[NativeSite] = []
        self._ranks: torch.Tensor | None = None

    def linear(self, weights: Sequence[Nf4Weight], bias: torch.Tensor | None) -> PanelLinear:
        parts = [(w.packed, w.absmax, w.out_features) for w in weights]
        panels = Nf4Panels.stack(parts, weights[0].in_features, store=self._store)
        return PanelLinear(panels, bias, self._scratch)

    def keep(self, weight: torch.Tensor) -> torch.Tensor:
        """A copy of a dense weight beside the NF4 ones, where streaming it costs fewest misses."""
        kept = self._store.take(weight.nbytes).view(weight.dtype).view(weight.shape)
        return kept.copy_(weight)

    def bind(self, site: SiteSpec, base: "BaseLinear") -> NativeSite:
        """The members' indices must follow one another."""
        kernel = NativeSite(site, base, self._scratch)
        self._sites.append(kernel)
        return kernel

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
