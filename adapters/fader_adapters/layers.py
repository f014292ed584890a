"""Puts Fader's linears into a transformers model. Knows modules and sites, not adapters by name."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fader_adapters.errors import BaseUnsupported
from fader_adapters.kernels import nf4
from fader_adapters.kernels.backend import Backend, BaseLinear, SiteKernel, Step
from fader_adapters.kernels.dense import DenseLinear
from fader_adapters.spec import BaseSpec, Digest, LinearSpec, SiteSpec

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Siblings that read one input in every transformers family that has them."""

PANEL_WEIGHTS = 1 << 20
"""Weights that are decoded at a time for those who ask for them by rows."""
PANEL_ROWS = 32


class StepState:
    """The work of the forward that runs now; every site of a model reads the same one."""

    def __init__(self) -> None:
        self.step: Step | None = None
        self.lane: Mapping[Site, BaseLinear] | None = None
        """Other weights to run instead of the sites' own, without any delta; None: the base's."""


class Site:
    """Linears that share an input, computed together when the first of them is called."""

    def __init__(self, spec: SiteSpec, kernel: SiteKernel, state: StepState) -> None:
        self.spec = spec
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
        rows = x.reshape(-1, self.spec.in_features)
        merged = None if lane is None else lane.get(self)
        y = self.kernel(rows, step) if merged is None else merged(rows)
        if len(self._starts) == 1:
            return y.view(*x.shape[:-1], y.shape[-1])
        parts = torch.split(
            y.view(*x.shape[:-1], y.shape[-1]), list(self.spec.out_features), dim=-1
        )
        self._input, self._ran = x, (step, lane)
        self._waiting = {i: part for i, part in enumerate(parts) if i != member}
        return parts[member]


class SiteLinear(nn.Module):
    """Stands in the model where a linear stood: x [..., in] → [..., out]."""

    def __init__(self, site: Site, member: int) -> None:
        super().__init__()
        self.site = site
        self.member = member
        self.in_features = site.spec.in_features
        self.out_features = site.spec.out_features[member]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.site.output(self.member, x)

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.site.kernel.base!r}"


@dataclass(frozen=True)
class Installed:
    """What `install` made of a model."""

    spec: BaseSpec
    sites: tuple[Site, ...]
    state: StepState

    @property
    def nbytes(self) -> int:
        """Resident bytes of every site's base weight."""
        return sum(site.kernel.base.nbytes for site in self.sites)

    def panels(self, linear: int) -> Iterator[torch.Tensor]:
        """W [out, in] of one linear in fp32, a few rows at a time; see BaseWeights."""
        site = next(site for site in self.sites if linear in site.spec.linears)
        place = site.spec.linears.index(linear)
        start = sum(site.spec.out_features[:place])
        stop = start + site.spec.out_features[place]
        step = max(PANEL_ROWS, PANEL_WEIGHTS // site.spec.in_features)
        for at in range(start, stop, step):
            yield site.kernel.base.rows(at, min(stop, at + step))


def install(model: PreTrainedModel, backend: Backend, *, name: str = "") -> Installed:
    """Replace every linear inside the decoder by Fader's, in place.

    bitsandbytes' NF4 linears hand over their packed bytes; plain linears and Conv1D keep their
    tensors. The output embedding stays as it is. Raises BaseUnsupported.
    """
    spec = describe(model, name=name)
    found = list(_linears(model))
    state = StepState()
    sites: list[Site] = []
    for members in _groups(found):
        shapes = [spec.linears[i] for i in members]
        site_spec = SiteSpec(
            tuple(members), shapes[0].in_features, tuple(shape.out_features for shape in shapes)
        )
        try:
            base = _base([found[i][1] for i in members], backend)
        except BaseUnsupported as error:
            raise BaseUnsupported(f"{found[members[0]][0]}: {error}") from error
        site = Site(site_spec, backend.bind(site_spec, base), state)
        sites.append(site)
        for place, index in enumerate(members):
            path, _ = found[index]
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, SiteLinear(site, place))
            found[index] = (path, nn.Identity())  # lets go of the original weight
    return Installed(spec, tuple(sites), state)


def describe(model: PreTrainedModel, *, name: str = "") -> BaseSpec:
    """The linears of a model that adapters may target; no weight is looked at.

    Raises BaseUnsupported when there is none.
    """
    found = list(_linears(model))
    if not found:
        raise BaseUnsupported(f"{type(model).__name__} has no linear that an adapter could target")
    return _spec(model, found, name)


def _linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if module is not head and isinstance(module, nn.Linear | Conv1D):
            yield path, module


def _shape(module: nn.Module) -> tuple[int, int]:
    """(in, out)"""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def _spec(model: PreTrainedModel, found: list[tuple[str, nn.Module]], name: str) -> BaseSpec:
    linears = []
    state = hashlib.sha256(model.config.model_type.encode())
    for path, module in found:
        width, out = _shape(module)
        layer = re.search(r"\.(\d+)\.", path)
        conv1d = isinstance(module, Conv1D) or getattr(module, "source_cls", None) is Conv1D
        linears.append(LinearSpec(path, width, out, int(layer[1]) if layer else None, conv1d))
        state.update(f"\0{path}\0{width}\0{out}".encode())
    return BaseSpec(tuple(linears), Digest(state.hexdigest()), model.config.model_type, name)


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
    return all(isinstance(found[i][1], Linear4bit) for i in members)


def _base(members: list[nn.Module], backend: Backend) -> BaseLinear:
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
