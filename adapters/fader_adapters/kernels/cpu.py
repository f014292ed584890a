"""The native CPU backend: NF4 panels and one call a site. Knows the C library, not models."""

from collections.abc import Sequence

import torch

from fader_adapters.kernels.native import Nf4Panels, Site, SiteTables, StepPlan, Workspace
from fader_adapters.kernels.nf4 import Nf4Weight
from fader_adapters.kernels.tables import Tables
from fader_adapters.spec import SiteSpec, StepTerms


class PanelLinear:
    """An NF4 weight repacked into column panels; resident at 0.5625 byte a weight."""

    def __init__(self, panels: Nf4Panels, bias: torch.Tensor | None, scratch: Workspace) -> None:
        self.panels = panels
        self.bias = bias
        self.out_features = panels.n
        self.in_features = panels.k
        self.scratch = scratch
        self._site = Site(panels, bias=bias, workspace=scratch)

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._site(x)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.panels.dense(dtype)


class NativeSite:
    """One site: base and deltas in one call, summed in fp32 and rounded once."""

    def __init__(self, site: SiteSpec, base: PanelLinear) -> None:
        self.base = base
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
        self._bound = Site(
            self.base.panels, views, bias=self.base.bias, workspace=self.base.scratch
        )

    def __call__(self, x: torch.Tensor, step: object | None) -> torch.Tensor:
        if step is None:
            return self.base(x)
        assert isinstance(step, StepPlan)
        assert self._bound is not None
        return self._bound(x, step)


class NativeBackend:
    """fp32 and bf16 on any x86-64, with the widest instructions the machine has."""

    name = "native"

    def __init__(self) -> None:
        self._scratch = Workspace()
        self._sites: list[NativeSite] = []
        self._ranks: torch.Tensor | None = None

    def linear(self, weight: Nf4Weight, bias: torch.Tensor | None) -> PanelLinear:
        panels = Nf4Panels.from_bnb(
            weight.packed, weight.absmax, weight.out_features, weight.in_features
        )
        return PanelLinear(panels, bias, self._scratch)

    def bind(self, site: SiteSpec, base: PanelLinear) -> NativeSite:
        """The members' indices must follow one another."""
        kernel = NativeSite(site, base)
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
        blends: Sequence[Sequence[tuple[int, float]]] = [row.terms for row in terms.rows]
        return StepPlan.of(blends, row_of_token, slots=tables.slots)
