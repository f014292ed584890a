"""The delta kernels on a GPU in bf16 against fp64: parity, a row's bits, capture, NaN traps."""

from dataclasses import replace

import pytest
import torch

from fader_adapters.spec import RowTerms, StepTerms
from tests.support.lora_world import DeltaWorld, make_delta_world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
pytest.importorskip("triton", reason="the CUDA kernels need triton")

SITES = ((4096, (4096, 1024, 1024)), (14336, (4096,)), (4096, (14336, 14336)), (192, (200,)))
"""q/k/v, down and gate/up of an 8B model, and a small one that no block divides."""

RANKS = ((8,), (16,), (64,), (1,), (256,), (5,), (32,), (0, 16, 16, 0, 16, 0, 16))
ATOL, RTOL = 3e-2, 1e-2


@pytest.fixture(scope="module")
def world() -> DeltaWorld:
    return make_delta_world(SITES, RANKS, torch.bfloat16, device="cuda")


def _rig(world, configs=None, **options):
    from fader_adapters.kernels.cuda.lora import DeltaKernels

    kernels = DeltaKernels(torch.device("cuda"), torch.bfloat16, **options)
    return kernels, [kernels.bind(site, configs) for site in world.sites]


def _operands(world, which, tokens, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    site = world.sites[which]
    shape = {"device": "cuda", "generator": g}
    x = torch.randn(tokens, site.in_features, **shape).bfloat16()
    return x, torch.randn(tokens, sum(site.out_features), **shape).bfloat16()


def _added(kernels, bound, world, terms, x, y):
    from fader_adapters.kernels.cuda.lora import delta

    step = kernels.prepare(world.tables, terms)
    step.buffers.z.fill_(torch.nan)
    y = y.clone()
    delta(y, x, bound, step)
    return y


def _mixes() -> dict[str, StepTerms]:
    blends = [
        tuple((s, 1.5 - 0.4 * s) for s in range(8) if (i * 37 + 5) >> s & 1) for i in range(64)
    ]
    return {
        "one row": StepTerms((RowTerms(1, ((2, 1.0),)),)),
        "one adapter": StepTerms((RowTerms(1, ((1, 1.0),)),) * 64),
        "all distinct": StepTerms(tuple(RowTerms(1, ((i, 1.0),)) for i in range(8))),
        "blends": StepTerms(tuple(RowTerms(1, blend[:4]) for blend in blends)),
        "prefill": StepTerms(
            (
                RowTerms(300, ((2, 1.0), (5, -1.5))),
                RowTerms(1, ((0, 1.0),)),
                RowTerms(23),
                RowTerms(7, ((4, 0.3),)),
                RowTerms(1),
            )
        ),
    }


def _check(world, which, terms, x, y, got):
    want = world.expected(y, x, world.sites[which], terms)
    assert got.isfinite().all()
    torch.testing.assert_close(got.double(), want, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("name", _mixes())
def test_every_mix_equals_fp64(world, name):
    kernels, sites = _rig(world)
    terms = _mixes()[name]
    for which, bound in enumerate(sites):
        x, y = _operands(world, which, sum(row.tokens for row in terms.rows))
        got = _added(kernels, bound, world, terms, x, y)
        _check(world, which, terms, x, y, got)


def test_the_comparison_notices_one_wrong_weight(world):
    kernels, sites = _rig(world)
    terms = _mixes()["all distinct"]
    wrong = StepTerms((RowTerms(1, ((0, 0.8),)), *terms.rows[1:]))
    x, y = _operands(world, 0, 8)
    got = _added(kernels, sites[0], world, wrong, x, y)
    with pytest.raises(AssertionError):
        _check(world, 0, terms, x, y, got)


@pytest.mark.parametrize("block_n", [32, 64, 128])
def test_expand_has_no_nan_and_one_answer_at_every_block_width(world, block_n):
    """Triton once made NaN of such a kernel with 128 columns on sm_90 (vLLM #48590)."""
    from fader_adapters.kernels.cuda.lora_tables import ExpandConfig, site_configs
    from fader_adapters.kernels.cuda.machines import arch_of

    arch = arch_of(torch.cuda.get_device_capability())
    for name in ("blends", "prefill"):
        terms = _mixes()[name]
        for stages in (2, 3, 4):
            expand = dict.fromkeys(("decode", "prefill"), ExpandConfig(block_n, 4, stages))
            configs = replace(site_configs(arch, 4096, 6144), expand=expand)
            kernels, sites = _rig(world, configs)
            x, y = _operands(world, 0, sum(row.tokens for row in terms.rows))
            _check(world, 0, terms, x, y, _added(kernels, sites[0], world, terms, x, y))


def test_a_row_has_the_same_bits_alone_and_in_any_company(world):
    kernels, sites = _rig(world)
    terms = _mixes()["blends"]
    for which, bound in enumerate(sites):
        x, y = _operands(world, which, 64)
        together = _added(kernels, bound, world, terms, x, y)
        backwards = StepTerms(terms.rows[::-1])
        flipped = _added(kernels, bound, world, backwards, x.flip(0), y.flip(0)).flip(0)
        assert torch.equal(together, flipped)
        for row in (0, 1, 17, 40, 63):
            if not terms.rows[row].terms:
                continue
            one = StepTerms((terms.rows[row],))
            alone = _added(kernels, bound, world, one, x[row : row + 1], y[row : row + 1])
            assert torch.equal(alone[0], together[row])


def test_infinity_of_another_adapter_stays_with_its_own_row():
    world = make_delta_world(SITES[:1], [(8,), (16,)], torch.bfloat16, device="cuda")
    a = int(world.tables.a_offset[1, 0])
    world.tables.arena[a : a + 16 * 4096] = 3e38
    kernels, sites = _rig(world)
    x, y = _operands(world, 0, 3)
    terms = StepTerms((RowTerms(1, ((0, 1.0),)), RowTerms(1, ((1, 1.0),)), RowTerms(1)))
    got = _added(kernels, sites[0], world, terms, x.abs() + 1, y)
    assert got[[0, 2]].isfinite().all()
    assert not got[1].isfinite().all()


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_a_captured_step_replays_with_other_rows_and_coefficients(world, rows):
    from fader_adapters.kernels.cuda.lora import delta

    kernels, sites = _rig(world)
    x, y = _operands(world, 0, rows)
    out = y.clone()
    first = StepTerms(tuple(RowTerms(1, ((i % 3, 1.0),)) for i in range(rows)))
    step = kernels.prepare(world.tables, first)
    assert step is not None
    assert step.bucket == rows
    delta(out, x, sites[0], step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(y)
        delta(out, x, sites[0], step)
    for gamma, blend in ((0.5, (4,)), (-1.5, (0, 1, 2, 6)), (2.0, (3, 5))):
        terms = StepTerms(
            tuple(
                RowTerms(1, tuple((s, gamma) for s in blend) if i % 2 == 0 else ())
                for i in range(rows)
            )
        )
        again = kernels.prepare(world.tables, terms)
        assert again is not None
        assert again.bucket == rows
        graph.replay()
        _check(world, 0, terms, x, y, out)
        eager = _added(kernels, sites[0], world, terms, x, y)
        assert torch.equal(out, eager)
