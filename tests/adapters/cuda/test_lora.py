"""The delta kernels in Triton's interpreter against fp64, and a row's bits in any company."""

import itertools
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")
if torch.cuda.is_available():
    pytest.skip("with a GPU tests/gpu checks these kernels", allow_module_level=True)

from fader_adapters.errors import BaseUnsupported, KernelUnavailable
from fader_adapters.kernels.cuda import lora_calls
from fader_adapters.kernels.cuda.lora import DeltaKernels, DeltaSite, LoraStep, delta
from fader_adapters.kernels.cuda.lora_configs import shipped
from fader_adapters.kernels.cuda.lora_tables import (
    EXPAND,
    SHRINK,
    ExpandConfig,
    ShrinkConfig,
    SiteConfigs,
    site_configs,
)
from fader_adapters.spec import RowTerms, SiteSpec, StepTerms
from tests.support.deltas import RANKS, steps
from tests.support.lora_world import DeltaWorld, make_delta_world

CPU = torch.device("cpu")
TOLERANCE = 1e-5
SITES = ((128, (96, 64)), (80, (40, 24, 200)))
"""The second: widths that no block divides, three members, and a first linear other than 0."""


@dataclass
class Rig:
    """A world, its kernels and its bound sites."""

    world: DeltaWorld
    kernels: DeltaKernels
    sites: list[DeltaSite]

    def prepare(self, terms: StepTerms) -> LoraStep | None:
        step = self.kernels.prepare(self.world.tables, terms)
        if step is not None:
            step.buffers.z.fill_(torch.nan)
        return step

    def run(self, terms: StepTerms, which: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y with the deltas of one site added, in a copy."""
        y = y.clone()
        step = self.prepare(terms)
        if step is not None:
            delta(y, x, self.sites[which], step)
        return y

    def operands(self, terms: StepTerms, which: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x and y of a step, in rows of a wider tensor."""
        tokens = sum(row.tokens for row in terms.rows)
        site = self.world.sites[which]
        g = torch.Generator().manual_seed(3)
        x = torch.randn(tokens, site.in_features + 16, generator=g)[:, : site.in_features]
        return x, torch.randn(tokens, sum(site.out_features) + 16, generator=g)[:, 8:-8]


def rig(ranks=None, sites=SITES, configs=None, **options) -> Rig:
    world = make_delta_world(
        sites, [(r,) for r in (8, 16, 64, 1, 16, 5)] if ranks is None else ranks, torch.float32
    )
    kernels = DeltaKernels(CPU, torch.float32, arch=90, **options)
    return Rig(world, kernels, [kernels.bind(site, configs) for site in world.sites])


def error(made: Rig, terms: StepTerms, which: int, wrong: StepTerms | None = None) -> float:
    x, y = made.operands(terms, which)
    got = made.run(wrong or terms, which, x, y)
    want = made.world.expected(y, x, made.world.sites[which], terms)
    return float((got.double() - want).abs().max())


def mixed() -> Rig:
    """RANKS over five linears: subsets of modules, ranks that differ inside a site."""
    return rig([(a, b, a, 0 if i % 2 else b, 3 * i) for i, (a, b) in enumerate(RANKS)])


@pytest.fixture(scope="module")
def shared() -> Rig:
    return mixed()


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", steps())
def test_every_mix_equals_fp64(shared, name, which):
    assert error(shared, steps()[name], which) < TOLERANCE


def test_the_comparison_notices_one_wrong_weight(shared):
    terms = steps()["blends and prefill"]
    wrong = StepTerms((RowTerms(1, ((0, 0.5), (1, -0.69))), *terms.rows[1:]))
    assert error(shared, terms, 0, wrong) > 10 * TOLERANCE


@pytest.mark.parametrize("rank", [1, 15, 17, 100, 256])
def test_any_rank_alone_and_beside_others(rank):
    made = rig([(rank,), (8,)], sites=SITES[:1])
    rows = (RowTerms(1, ((0, 1.0),)), RowTerms(3, ((0, -1.0), (1, 1.0))), RowTerms(1, ((1, 1.0),)))
    assert error(made, StepTerms(rows), 0) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 7, 63, 133])
@pytest.mark.parametrize("rank", [1, 8, 16, 64])
def test_every_row_count_rank_and_skew(rank, tokens):
    made = rig([(rank,), (8,), (64,), (1,)])
    mixes = {
        "one": [((0, 1.0),)] * tokens,
        "distinct": [((i % 4, 0.5 + i),) for i in range(tokens)],
        "skewed": [((0 if i else 1, 1.0),) for i in range(tokens)],
        "blends": [tuple((s, 0.5 - s) for s in range(4) if i >> s & 1) for i in range(tokens)],
    }
    for mix, blends in mixes.items():
        terms = StepTerms(tuple(RowTerms(1, blend) for blend in blends))
        for which in (0, 1):
            size = max(1.0, tokens / 8) if mix == "distinct" else 1.0
            assert error(made, terms, which) < TOLERANCE * size, mix
    for blend in mixes["blends"][-1:]:
        for which in (0, 1):
            assert error(made, StepTerms((RowTerms(tokens, blend),)), which) < TOLERANCE


def _small(shrink: ShrinkConfig, expand: ExpandConfig) -> SiteConfigs:
    return SiteConfigs(
        dict.fromkeys(("decode", "prefill"), shrink), dict.fromkeys(("decode", "prefill"), expand)
    )


@pytest.mark.parametrize(
    ("splits", "block_k", "block_n", "programs"),
    [(1, 64, 32, 1), (4, 32, 128, 2), (8, 16, 64, 32), (8, 128, 128, 3)],
)
def test_every_plane_count_and_block_equals_fp64(splits, block_k, block_n, programs):
    """Also with more planes than blocks along the input."""
    configs = _small(ShrinkConfig(block_k, splits, programs, 4, 2), ExpandConfig(block_n, 4, 2))
    made = rig(configs=configs, sites=SITES[1:])
    rows = (RowTerms(1, ((0, 0.5), (1, -0.7))), RowTerms(20, ((2, 1.0), (5, -1.5))))
    assert error(made, StepTerms(rows), 0) < TOLERANCE


COMPANY = (
    ((0, 0.5), (1, -0.7)),
    ((1, 1.0), (2, 2.0), (4, 0.1)),
    ((2, 1.0),),
    (),
    ((5, 1.0),),
    ((0, 1.0), (3, 0.3), (4, 1.1), (5, -0.2)),
    ((2, -1.0), (4, 1.0)),
)


def _alone(made: Rig, which: int, x: torch.Tensor, y: torch.Tensor, blend) -> torch.Tensor:
    return made.run(StepTerms((RowTerms(1, blend),)), which, x[None], y[None])[0]


@pytest.mark.parametrize(
    "blend",
    [pytest.param(b, marks=[] if len(b) in {0, 4} else pytest.mark.slow) for b in COMPANY],
    ids=str,
)
def test_a_row_has_the_same_bits_alone_and_in_any_company(blend):
    """At every place of a tile, and with terms of other rows before, between and after its own."""
    configs = _small(ShrinkConfig(32, 2, 2, 4, 2), ExpandConfig(128, 4, 2))
    made = rig(configs=configs, sites=((128, (96, 64)),))
    others = [RowTerms(1, b) for b in COMPANY if b != blend]
    mine = RowTerms(1, blend)
    companies = [
        [mine] * 5,
        [*others, mine],
        [*others[:3], mine, *others * 3],
        [others[0]] * 16 + [mine] + others,
        [RowTerms(30, others[0].terms), mine, RowTerms(7, others[1].terms)],
    ]
    x, y = torch.randn(128), torch.randn(160)
    alone = _alone(made, 0, x, y, blend)
    for company in companies:
        terms = StepTerms(tuple(company))
        xs, ys = made.operands(terms, 0)
        at = sum(row.tokens for row in company[: company.index(mine)])
        xs[at], ys[at] = x, y
        assert torch.equal(made.run(terms, 0, xs, ys)[at], alone)


def test_summing_the_same_terms_in_another_order_gives_other_bits():
    """What the test above could not notice if the sums were exact."""
    made = rig()
    x, y = torch.randn(128), torch.randn(160)
    blend = ((0, 0.5), (1, -0.7), (2, 1.3))
    assert not torch.equal(_alone(made, 0, x, y, blend), _alone(made, 0, x, y, blend[::-1]))


def test_a_prompt_has_the_same_bits_beside_any_other_row():
    made = rig()
    mine, other = RowTerms(70, COMPANY[1]), RowTerms(9, COMPANY[5])
    alone = StepTerms((mine,))
    x, y = made.operands(alone, 0)
    want = made.run(alone, 0, x, y)
    beside = StepTerms((other, mine, RowTerms(1, COMPANY[2])))
    xs, ys = made.operands(beside, 0)
    xs[9:79], ys[9:79] = x, y
    assert torch.equal(made.run(beside, 0, xs, ys)[9:79], want)


def test_rows_without_terms_keep_every_bit(shared):
    terms = steps()["blends and prefill"]
    x, y = shared.operands(terms, 0)
    y[[2, 110]] = -0.0
    got = shared.run(terms, 0, x, y)
    free = [2, *range(103, 126)]
    assert torch.equal(got[free].view(torch.int32), y[free].contiguous().view(torch.int32))
    assert not torch.equal(got[0], y[0])


def test_a_member_that_no_term_adapts_keeps_every_bit(shared):
    terms = StepTerms((RowTerms(1, ((2, 1.0),)), RowTerms(1, ((0, 1.0),))))
    x, y = shared.operands(terms, 0)
    got = shared.run(terms, 0, x, y)
    assert torch.equal(got[0, 96:], y[0, 96:])
    assert not torch.equal(got[1, 96:], y[1, 96:])


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid:RuntimeWarning")
def test_infinity_in_the_product_of_another_adapter_stays_with_its_own_row():
    made = rig()
    a = int(made.world.tables.a_offset[1, 0])
    made.world.tables.arena[a : a + 16 * 128] = 3e38
    terms = StepTerms((RowTerms(1, ((0, 1.0),)), RowTerms(1, ((1, 1.0),)), RowTerms(1)))
    x, y = made.operands(terms, 0)
    got = made.run(terms, 0, x.abs() + 1, y)
    assert got[[0, 2]].isfinite().all()
    assert not got[1].isfinite().all()


def test_nan_in_another_rows_input_stays_with_its_own_row(shared):
    terms = StepTerms(tuple(RowTerms(1, ((1, 1.0),)) for _ in range(3)))
    x, y = shared.operands(terms, 0)
    x[1] = torch.nan
    got = shared.run(terms, 0, x, y)
    assert got[[0, 2]].isfinite().all()
    assert got[1].isnan().all()


def test_padding_of_a_bucket_is_neither_read_nor_written(shared):
    terms = StepTerms(tuple(RowTerms(1, ((i % 6, 1.0),)) for i in range(19)))
    step = shared.prepare(terms)
    assert step.bucket == 32
    x, y = torch.full((32, 128), torch.nan), torch.full((32, 160), torch.nan)
    x[:19], y[:19] = shared.operands(terms, 0)
    want = shared.world.expected(y[:19], x[:19], shared.world.sites[0], terms)
    delta(y, x, shared.sites[0], step)
    torch.testing.assert_close(y[:19].double(), want, rtol=0, atol=TOLERANCE)
    assert y[19:].isnan().all()


def test_an_idle_step_and_one_of_slots_that_adapt_nothing_have_no_work():
    made = rig([(8,), (0,)])
    assert made.prepare(steps()["base rows only"]) is None
    assert made.prepare(StepTerms((RowTerms(1, ((1, 1.0),)), RowTerms(9, ((1, 2.0),))))) is None
    assert made.prepare(StepTerms((RowTerms(1, ((0, 1.0),)),))) is not None


def test_a_republished_slot_is_read_anew():
    made, terms = rig(), steps()["one adapter, every row"]
    x, y = made.operands(terms, 0)
    before = made.run(terms, 0, x, y)
    made.world.tables.scale[0] *= 2
    assert torch.equal(made.run(terms, 0, x, y), before)
    made.world.tables.generation += 1
    assert not torch.equal(made.run(terms, 0, x, y), before)


def test_tables_may_grow_between_steps():
    made = rig()
    terms = StepTerms((RowTerms(1, ((70, 1.0),)), RowTerms(1, ((0, 1.0),))))
    assert error(made, StepTerms((RowTerms(1, ((0, 1.0),)),)), 0) < TOLERANCE
    tables = made.world.tables
    while tables.slots <= 70:
        tables._grow()
    for of in (tables.a_offset, tables.b_offset, tables.rank, tables.scale):
        of[70] = of[2]
    tables.generation += 1
    assert error(made, terms, 0) < TOLERANCE


def test_sites_that_cannot_run_together_are_refused():
    kernels = DeltaKernels(CPU, torch.float32, arch=80)
    with pytest.raises(BaseUnsupported, match="follow one another"):
        kernels.bind(SiteSpec((0, 2), 64, (64, 64)))
    with pytest.raises(BaseUnsupported, match="at most 4"):
        kernels.bind(SiteSpec((0, 1, 2, 3, 4), 64, (64,) * 5))
    with pytest.raises(KernelUnavailable, match="float64"):
        DeltaKernels(CPU, torch.float64, arch=80)


@pytest.mark.parametrize("arch", [80, 90])
def test_every_shape_has_a_configuration(arch):
    for width, out in itertools.product((1, 64, 1024, 4096, 14336, 1 << 20), repeat=2):
        configs = site_configs(arch, width, out)
        for phase in ("decode", "prefill"):
            assert configs.shrink[phase] in [c for _, c in SHRINK[arch, phase]]
            assert configs.expand[phase] in [c for _, c in EXPAND[arch, phase]]


class _Recorder:
    """Stands for a kernel and keeps the options of its launches."""

    def __init__(self, name: str, into: list) -> None:
        self._name, self._into = name, into

    def __getitem__(self, grid):
        return lambda *args, **options: self._into.append((self._name, options))


@pytest.mark.parametrize("arch", [80, 90])
def test_whatever_can_be_launched_is_listed_as_shipped(arch, monkeypatch):
    launched = []
    for name in ("shrink", "expand", "resolve"):
        monkeypatch.setattr(lora_calls, f"_{name}_kernel", _Recorder(name, launched))
    sites = [(64, (64,)), (4096, (4096, 1024, 1024)), (14336, (4096,)), (4096, (14336, 14336))]
    for shape in sites:
        kernels = DeltaKernels(CPU, torch.bfloat16, arch=arch)
        world = make_delta_world([(64, shape[1])], [(8,)], torch.bfloat16)
        site = SiteSpec(world.sites[0].linears, *shape)
        bound = kernels.bind(site)
        for rows in (1, 70):
            step = kernels.prepare(world.tables, StepTerms((RowTerms(rows, ((0, 1.0),)),)))
            x = torch.empty(rows, shape[0], dtype=torch.bfloat16)
            delta(x.new_empty(rows, sum(shape[1])), x, bound, step)
    listed = [
        (s.kernel.__name__, s.constexprs | {"num_warps": s.num_warps, "num_stages": s.num_stages})
        for s in shipped()
        if arch in s.archs
    ]
    assert {name for name, _ in launched} == {"shrink", "expand", "resolve"}
    assert all(entry in listed for entry in launched)
    name, options = launched[-1]
    assert (name, options | {"num_warps": 16}) not in listed
