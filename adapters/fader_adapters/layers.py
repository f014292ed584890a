"""Puts Fader's linears into a transformers model. Knows modules and sites, not adapters by name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fader_adapters.describe import activation_dtype, describe, linears
from fader_adapters.errors import BaseUnsupported
from fader_adapters.expert_layers import Stack, install_mixtures
from fader_adapters.expert_proofs import unproven
from fader_adapters.kernels import nf4
from fader_adapters.kernels.backend import (
    Backend,
    BaseLinear,
    ExpertsWeight,
    LookupBackend,
    LookupKernel,
    SiteKernel,
    StackBackend,
)
from fader_adapters.kernels.dense import DenseLinear, EmbeddingTable
from fader_adapters.kernels.native.panels import PANEL
from fader_adapters.packed_weight import PackedWeight
from fader_adapters.spec import BaseSpec, Role, SiteSpec
from fader_adapters.step_state import StepState

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Siblings that read one input in every transformers family that has them."""

PANEL_WEIGHTS = 1 << 20
"""Weights that are decoded at a time for those who ask for them by rows."""


class Site:
    """Linears that share an input, computed together when the first of them is called."""

    def __init__(
        self, spec: SiteSpec, kernel: SiteKernel, state: StepState, *, head: bool = False
    ) -> None:
        """`head`: it sees the rows whose logits are wanted, not all tokens of the step."""
        self.spec = spec
        self.head = head
        self.kernel = kernel
        self._state = state
        self._starts = [sum(spec.out_features[:i]) for i in range(len(spec.out_features))]
        self._input: torch.Tensor | None = None
        self._ran: tuple[object, object] = (None, None)
        self._waiting: dict[int, torch.Tensor] = {}

    def output(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """[..., out of the member]; the others wait for a call with the very same tensor."""
        step, lane = self._state.step, self._state.lane
        same = x is self._input and step is self._ran[0] and lane is self._ran[1]
        if same and member in self._waiting:
            y = self._waiting.pop(member)
            if not self._waiting:
                self._input, self._ran = None, (None, None)
            return y
        rows = in_rows(x, self.spec.in_features)
        if not self.head:
            self._state.check_tokens(rows.shape[0])
        merged = None if lane is None else lane.bases.get(self)
        y = self.kernel(rows, self._state.at(x, head=self.head)) if merged is None else merged(rows)
        if len(self._starts) == 1:
            return y.view(*x.shape[:-1], y.shape[-1])
        parts = torch.split(
            y.view(*x.shape[:-1], y.shape[-1]), list(self.spec.out_features), dim=-1
        )
        self._input, self._ran = x, (step, lane)
        self._waiting = {i: part for i, part in enumerate(parts) if i != member}
        return parts[member]


def in_rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """[tokens, width], each side by side, as kernels take them."""
    rows = x.reshape(-1, width)
    return rows if rows.stride(-1) == 1 or width == 1 else rows.contiguous()


class SiteLinear(nn.Module):
    """Stands in the model where a linear stood: x [..., in] → [..., out]."""

    def __init__(
        self,
        site: Site,
        member: int,
        weight: PackedWeight | nn.Parameter,
        bias: nn.Parameter | None = None,
    ) -> None:
        """bias: what the site adds, for a model that takes it away again."""
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.site = site
        self.member = member
        self.in_features = site.spec.in_features
        self.out_features = site.spec.out_features[member]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.site.output(self.member, x)

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.site.kernel.base!r}"


class SiteHead(SiteLinear):
    """Stands where the output head stood, and keeps its weight: tied stays tied."""

    weight: nn.Parameter

    def __init__(self, site: Site, head: nn.Linear) -> None:
        assert isinstance(head.weight, nn.Parameter)
        super().__init__(site, 0, head.weight, head.bias)


class SiteEmbedding(nn.Module):
    """Stands where the embedding stood: token ids [...] → [..., width]."""

    def __init__(self, inner: nn.Embedding, kernel: LookupKernel, state: StepState) -> None:
        super().__init__()
        self.inner: nn.Module = inner
        self._kernel = kernel
        self._state = state

    @property
    def weight(self) -> object:
        """The table, as long as the embedding has one of its own."""
        return getattr(self.inner, "weight", None)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        lane = self._state.lane
        if lane is not None and lane.table is not None:
            return F.embedding(ids, lane.table)
        y = self.inner(ids)
        self._kernel(y.view(-1, y.shape[-1]), ids.reshape(-1), self._state.step)
        return y


@dataclass(frozen=True)
class Installed:
    """What `install` made of a model."""

    spec: BaseSpec
    sites: tuple[Site, ...]
    """Of the linears; the head's is not among them."""
    state: StepState
    head: Site | None = None
    table: EmbeddingTable | None = None
    stacks: Mapping[int, Stack] = field(default_factory=dict)
    """Experts and routers by their index in `spec.linears`."""

    @property
    def every_site(self) -> tuple[Site, ...]:
        """The head's too, where it is one."""
        return self.sites if self.head is None else (*self.sites, self.head)

    @property
    def nbytes(self) -> int:
        """Resident bytes of every linear's base weight; head and embedding are the model's own."""
        return sum(site.kernel.base.nbytes for site in self.sites)

    def panels(self, linear: int) -> Iterator[torch.Tensor]:
        """W [out, in] of one linear in fp32, a few rows at a time; see BaseWeights."""
        base, start = self._base(linear)
        spec = self.spec.linears[linear]
        stop = start + spec.out_features * spec.experts
        step = max(PANEL, PANEL_WEIGHTS // spec.in_features)
        for at in range(start, stop, step):
            yield base.rows(at, min(stop, at + step))

    def _base(self, linear: int) -> tuple[BaseLinear | ExpertsWeight, int]:
        """Where a linear's rows are, and the first of them."""
        if linear in self.stacks:
            return self.stacks[linear].weight, 0
        if self.spec.linears[linear].role == "embedding":
            assert self.table is not None
            return self.table, 0
        site = next(site for site in self.every_site if linear in site.spec.linears)
        place = site.spec.linears.index(linear)
        return site.kernel.base, sum(site.spec.out_features[:place])


def install(model: PreTrainedModel, backend: Backend, *, name: str = "") -> Installed:
    """Replace every linear by Fader's, in place, and the embedding and mixtures' experts, if the
    backend adapts those.

    bitsandbytes' NF4 linears hand over their packed bytes; plain linears, Conv1D, the output head
    and the embedding keep their tensors. Raises BaseUnsupported, before anything is replaced.
    """
    spec = describe(model, name=name)
    spec = _adaptable(model, spec, backend)
    found = list(linears(model))
    for path, module in found:
        _check(path, module)
    own = activation_dtype(model)
    state = StepState()
    sites: list[Site] = []
    for members in _groups(found):
        shapes = [spec.linears[i] for i in members]
        site_spec = SiteSpec(
            tuple(members), shapes[0].in_features, tuple(shape.out_features for shape in shapes)
        )
        base = _base([found[i][1] for i in members], backend)
        site = Site(site_spec, backend.bind(site_spec, base), state)
        sites.append(site)
        for place, index in enumerate(members):
            path, module = found[index]
            assert isinstance(module.weight, nn.Parameter)
            weight = PackedWeight(base.plain_dtype or own, module.weight.device, path)
            bias = module.bias if isinstance(module.bias, nn.Parameter) else None
            model.set_submodule(path, SiteLinear(site, place, weight, bias))
            found[index] = (path, nn.Identity())  # lets go of a weight that nobody else keeps
    head = table = None
    for index, item in enumerate(spec.linears):
        site_spec = SiteSpec((index,), item.in_features, (item.out_features,))
        if item.role == "head":
            head = _install_head(model, site_spec, item.path, backend, state)
        elif item.role == "embedding":
            assert isinstance(backend, LookupBackend)
            inner = model.get_submodule(item.path)
            assert isinstance(inner, nn.Embedding)
            assert isinstance(inner.weight, nn.Parameter)
            table = EmbeddingTable(inner.weight, inner)
            model.set_submodule(
                item.path, SiteEmbedding(inner, backend.bind_lookup(site_spec), state)
            )
    stacks = {}
    if isinstance(backend, StackBackend):
        stacks = install_mixtures(model, spec, backend, state)
    return Installed(spec, tuple(sites), state, head, table, stacks)


def _adaptable(model: PreTrainedModel, spec: BaseSpec, backend: Backend) -> BaseSpec:
    """The base without what the backend's kernels do not adapt."""
    others: set[Role] = set()
    if not isinstance(backend, LookupBackend):
        others.add("embedding")
    if not isinstance(backend, StackBackend):
        others |= {"experts", "router"}
    known = replace(spec, linears=tuple(i for i in spec.linears if i.role not in others))
    strange = unproven(model, known)
    kept = tuple(item for item in known.linears if item.path not in strange)
    left_out = frozenset(item.role for item in spec.linears if item not in kept)
    return replace(spec, linears=kept, left_out=left_out)


def _install_head(
    model: PreTrainedModel, spec: SiteSpec, path: str, backend: Backend, state: StepState
) -> Site:
    head = model.get_submodule(path)
    assert isinstance(head, nn.Linear)
    base = DenseLinear(head.weight.data, _bias(head))
    site = Site(spec, backend.bind(spec, base), state, head=True)
    model.set_submodule(path, SiteHead(site, head))
    return site


def _groups(found: list[tuple[str, nn.Module]]) -> Iterator[list[int]]:
    """Indices of the linears of each site, in model order."""
    place = {path: i for i, (path, _) in enumerate(found)}
    grouped: set[int] = set()
    for i, (path, _) in enumerate(found):
        if i in grouped:
            continue
        members = [i]
        parent, _, child = path.rpartition(".")
        for names in SHARED_INPUTS:
            together = [place.get(f"{parent}.{other}") for other in names]
            in_order = list(range(i, i + len(names)))
            if child == names[0] and together == in_order and _stackable(found, in_order):
                members = in_order
        grouped.update(members)
        yield members


def _stackable(found: list[tuple[str, nn.Module]], members: list[int]) -> bool:
    from bitsandbytes.nn.modules import Linear4bit

    given = [module for i in members if isinstance(module := found[i][1], Linear4bit)]
    # attention to something else, such as pictures, has keys and values of another width
    return len(given) == len(members) and len({module.in_features for module in given}) == 1


def _check(path: str, module: nn.Module) -> None:
    """Raises BaseUnsupported for a linear that `_base` cannot read."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    if not isinstance(module, Linear4bit):
        return
    assert isinstance(module.weight, Params4bit)
    try:
        nf4.check_bitsandbytes(module.weight)
    except BaseUnsupported as error:
        raise BaseUnsupported(f"{path}: {error}") from error


def _base(members: list[nn.Module], backend: Backend) -> BaseLinear:
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    first = members[0]
    if not isinstance(first, Linear4bit):
        assert isinstance(first, nn.Linear | Conv1D)
        assert isinstance(first.weight, nn.Parameter)
        weight = first.weight.data.T if isinstance(first, Conv1D) else first.weight.data
        return DenseLinear(weight, _bias(first))
    weights, biases = [], []
    for module in members:
        assert isinstance(module.weight, Params4bit)
        weights.append(nf4.from_bitsandbytes(module.weight))
        biases.append(_bias(module))
    given = next((bias for bias in biases if bias is not None), None)
    if given is None:
        return backend.linear(weights, None)
    filled = [
        given.new_zeros(weight.out_features) if bias is None else bias
        for bias, weight in zip(biases, weights, strict=True)
    ]
    return backend.linear(weights, torch.cat(filled))


def _bias(module: nn.Module) -> torch.Tensor | None:
    return module.bias.data if isinstance(module.bias, nn.Parameter) else None
