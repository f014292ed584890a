"""Figures of a merged lane beside the base and beside deltas: sites by rows, then whole steps."""

import importlib.util
from collections.abc import Sequence

import torch

from bench.gpu.figures import shape_of
from bench.gpu.model import Machine, decode_plan
from bench.gpu.parity import demand, limit
from bench.gpu.section import BitsDiffer, ParityFailed, Result, Rig, Unavailable, gate
from bench.gpu.shapes import SITE_NAMES, SMALL
from bench.gpu.steps import both_ways, decode, demand_graphs, machine, refuse
from bench.gpu.timing import captured, turns
from bench.gpu.weights import (
    SPREAD,
    adapter_spec,
    base_of,
    exact,
    nf4_weight,
    publish_adapters,
    rms,
)
from fader_adapters.changes import Changes
from fader_adapters.kernels.backend import BaseLinear
from fader_adapters.kernels.cuda.backend import CudaBackend
from fader_adapters.kernels.cuda.lora import DeltaKernels, delta
from fader_adapters.kernels.tables import Tables
from fader_adapters.layers import Installed, Site
from fader_adapters.merged_site import LaneSpec, SiteWork
from fader_adapters.spec import (
    AdapterSpec,
    BaseSpec,
    Blend,
    Digest,
    RowTerms,
    SiteSpec,
    StepTerms,
    Term,
)
from fader_adapters.step_state import LaneWeights, StepState
from fader_adapters.weightspace.plan import Form
from fader_server.core import Lane, Plan

FORMS: tuple[Form, ...] = ("nf4", "bf16")
RANK = 16


class _Host:
    """An adapter in host memory."""

    def __init__(self, spec: AdapterSpec) -> None:
        self.spec, self.flat = spec, torch.randn(spec.numel) * SPREAD


def measure_merged(rig: Rig, result: Result) -> None:
    """A lane's sites and steps over the base's, after what they compute was checked."""
    gate(check_merged, rig, result)
    sites = list(zip(SITE_NAMES, shape_of(rig).sites, strict=True))
    for name, (width, outs) in sites[: 1 if rig.small else None]:
        _measure_site(rig, result, name, width, outs)
    _measure_steps(rig, result)


def check_merged(rig: Rig, result: Result) -> None:
    """Small sites merged as the server merges them: x·W'ᵀ against W + γ·s·B·A in float64."""
    base, sites = base_of(SMALL.sites)
    small = _Small(rig, base)
    worst: dict[str, float] = {}
    for spec in sites:
        rig.check_time()
        error = small.check(spec)
        worst = {form: max(worst.get(form, 0.0), found) for form, found in error.items()}
    told = ", ".join(f"{form} {error:.1e}" for form, error in worst.items())
    result.add(f"merged lanes: relative error {told}", **worst)


class _Small:
    """A base of small linears and one blend over it."""

    def __init__(self, rig: Rig, base: BaseSpec) -> None:
        self.rig, self.base = rig, base
        arch = None if rig.on_gpu else 80
        self.backend = CudaBackend(rig.device, rig.dtype, arch=arch, entries=16)
        self.tables = Tables(torch.zeros(32, dtype=rig.dtype, device=rig.device), len(base.linears))
        spec = adapter_spec(base, 0, 8)
        self.blend = Blend.of([Term(spec.version, 0.75)])
        self.changes = Changes(self.blend, {spec.version: _Host(spec)}, base)
        self.installed = Installed(base, (), StepState(), None)

    def check(self, spec: SiteSpec) -> dict[str, float]:
        """The relative error of the site in each form. Raises ParityFailed, BitsDiffer."""
        rig = self.rig
        weight = nf4_weight(sum(spec.out_features), spec.in_features, rig)
        given = exact(weight)
        wanted = self._merged(spec, given)
        own = self.backend.linear([weight], None)
        site = Site(spec, self.backend.bind(spec, own), self.installed.state)
        x = torch.randn(17, spec.in_features, device=rig.device).to(rig.dtype)
        want = x.double() @ wanted.T
        if rms(x.double() @ given.T, want) <= 3 * limit(rig):
            raise ParityFailed("the comparison does not notice a site that was not merged")
        found = {}
        for form in FORMS:
            if form == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
                continue  # what is requantised is read back by it
            lane = self._lane(site, form)
            self.backend.prepare(self.tables, StepTerms((RowTerms(1),) * len(x)))
            got = lane(x)
            if form == "nf4":  # W' was rounded: the product must be that of its own codes
                demand(rms(got, want), 0.2, f"a lane in nf4 beside W', {spec.in_features} in")
                want_here = x.double() @ lane.dense(torch.float32).double().T
            else:
                want_here = want
            found[form] = rms(got, want_here)
            demand(found[form], limit(rig), f"a lane in {form}, {spec.in_features} in")
            for rows in (1, 3):
                if not torch.equal(lane(x[:rows]), got[:rows]):
                    raise BitsDiffer(f"a lane in {form}: a row's bits change among {rows} rows")
        return found

    def _merged(self, spec: SiteSpec, given: torch.Tensor) -> torch.Tensor:
        """W + Δ [out, in] in float64."""
        parts, column = [], 0
        for linear, out in zip(spec.linears, spec.out_features, strict=True):
            change = self.changes.of(linear)
            assert change is not None
            own = change.delta
            moved = (own.b.double() @ own.a.double()).to(given.device)
            parts.append(given[column : column + out] + moved)
            column += out
        return torch.cat(parts)

    def _lane(self, site: Site, form: Form) -> BaseLinear:
        spec = LaneSpec(self.blend, form, "keep")
        work = SiteWork(
            site, self.changes, spec, self.installed, dtype=self.rig.dtype, device=self.rig.device
        )
        return work.run(self.backend.room(), self.rig.check_time, lambda count: None)


def _measure_site(rig: Rig, result: Result, name: str, width: int, outs: tuple[int, ...]) -> None:
    """One site by rows: the base, with one adapter's deltas, and merged in both forms."""
    out = sum(outs)
    arch = None if rig.on_gpu else 80
    base, (site,) = base_of([(width, outs)])
    backend = CudaBackend(rig.device, rig.dtype, arch=arch, entries=16)
    room, count = backend.room(), turns(out * width * 9 // 16, rig)
    own = [backend.linear([nf4_weight(out, width, rig)], None) for _ in range(count)]
    merged: dict[str, Sequence[BaseLinear]] = {
        "nf4": [room.nf4([nf4_weight(out, width, rig)], (out, width), None) for _ in range(count)],
        "bf16": [
            room.plain([linear.dense(rig.dtype)], (out, width), None)
            for linear in own[: turns(2 * out * width, rig)]
        ],
    }
    tables = publish_adapters(base, (4 if rig.small else RANK,), rig)
    kernels = DeltaKernels(rig.device, rig.dtype, arch=arch, entries=16 if rig.small else 64)
    bound = kernels.bind(site)
    for rows in (1, 3) if rig.small else (1, 8, 32, 64):
        rig.check_time()
        x = torch.randn(rows, width, device=rig.device).to(rig.dtype)
        backend.prepare(tables, StepTerms((RowTerms(1),) * rows))  # decode rows from here on
        _check_products(rig, x, own[0], {form: lanes[0] for form, lanes in merged.items()})
        step = kernels.prepare(tables, StepTerms((RowTerms(1, ((0, 1.0),)),) * rows))
        assert step is not None

        def adapted(linear: BaseLinear, x: torch.Tensor = x, step: object = step) -> torch.Tensor:
            y = linear(x)
            delta(y, x, bound, step)  # pyright: ignore[reportArgumentType]
            return y

        plain = captured(rig, [lambda w=w, x=x: w(x) for w in own])
        deltas = captured(rig, [lambda w=w: adapted(w) for w in own])
        times = {
            form: captured(rig, [lambda w=w, x=x: w(x) for w in lanes])
            for form, lanes in merged.items()
        }
        ratios = {form: round(t.median / plain.median, 4) for form, t in times.items()}
        told = ", ".join(f"merged in {form} {ratio:.2f}×" for form, ratio in ratios.items())
        result.add(
            f"{name} M={rows}: {plain.median * 1e3:.0f} µs, with deltas "
            f"{deltas.median / plain.median:.2f}×, {told}",
            site=name,
            rows=rows,
            **{f"{form}_ratio": ratio for form, ratio in ratios.items()},
            **plain.facts("base"),
            **deltas.facts("deltas"),
            **{key: value for form, t in times.items() for key, value in t.facts(form).items()},
        )


def _check_products(
    rig: Rig, x: torch.Tensor, own: BaseLinear, lanes: dict[str, BaseLinear]
) -> None:
    """Each lane against its own weight in float64; the lane in bf16 holds the base's."""
    for form, lane in lanes.items():
        weight = lane.dense(torch.float32).double()
        demand(rms(lane(x), x.double() @ weight.T), limit(rig), f"a lane in {form}")
    demand(rms(lanes["bf16"](x), own(x)), 3 * limit(rig), "a bf16 lane of the base's weights")


def _measure_steps(rig: Rig, result: Result) -> None:
    """Whole decode steps in a lane, of the base, and with an adapter, in turn."""
    demand_graphs(rig)
    m = machine(rig)
    if m.graphs is None:
        raise Unavailable(f"the model was not captured: {m.told}")
    (slot,) = m.add_adapters(1, 4 if rig.small else RANK)
    for form in FORMS:
        rig.check_time()
        lane = Lane(Digest("1" * 64), Digest("2" * 64))
        m.runner.add_lane(lane, _copy(m) if form == "bf16" else _shared(m))
        try:
            _check_lane(rig, m, lane, form)
            for rows in (2,) if rig.small else (1, 8, 32):
                rig.check_time()
                base = decode(m, [()] * rows)
                merged = decode(m, [()] * rows, lane=lane)
                adapted = decode(m, [((slot, 1.0),)] * rows)
                ratio = merged.median / base.median
                result.add(
                    f"step of {rows} rows merged in {form}: {ratio:.3f}× the base, with one "
                    f"adapter's deltas {adapted.median / base.median:.3f}×",
                    form=form,
                    rows=rows,
                    ratio=round(ratio, 4),
                    **base.facts("base"),
                    **merged.facts("merged"),
                    **adapted.facts("deltas"),
                )
        finally:
            m.runner.drop_lane(lane)
    m.drop_adapters()


def _shared(m: Machine) -> LaneWeights:
    """The base's own weights."""
    return LaneWeights({site: site.kernel.base for site in m.base.installed.sites})


def _copy(m: Machine) -> LaneWeights:
    """The base's weights unquantised, output head and embedding too."""
    base, installed = m.base, m.base.installed
    room = base.backend.room()
    bases: dict[Site, BaseLinear] = {}
    for site in installed.every_site:
        own = site.kernel.base
        make = room.head if site.head else room.plain
        bases[site] = make([own.dense(base.dtype)], (own.out_features, own.in_features), None)
    table = None
    if installed.table is not None:
        table = installed.table.lookup(torch.arange(base.vocab_size, device=base.device))
    return LaneWeights(bases, table)


def _check_lane(rig: Rig, m: Machine, lane: Lane, form: Form) -> None:
    """Logits of a lane over the base's own weights are the base's: the same bits in NF4."""
    rows = 2 if rig.small else 8
    plan = decode_plan(m.streams([()] * rows, 9))
    want, _ = both_ways(m, plan)
    got = _lane_logits(m, lane, plan)
    demand(rms(got, want), 5e-2, f"logits of a lane in {form}")
    if form == "nf4" and not torch.equal(got, want):
        raise ParityFailed("a lane of the base's own weights gives other bits than the base")
    other = decode_plan(m.streams([()] * rows, 8))
    if rms(_lane_logits(m, lane, other), want) <= 5e-2:
        raise ParityFailed("the comparison does not notice other tokens")


def _lane_logits(m: Machine, lane: Lane, plan: Plan) -> torch.Tensor:
    weights, state = m.runner._lanes[lane], m.base.installed.state
    assert weights.replays is not None
    state.lane = weights.lane
    try:
        with torch.inference_mode():
            m.base.backend.prepare(m.tables, plan.terms)
            return weights.replays.run(plan, None, refuse).clone()
    finally:
        state.lane = None
