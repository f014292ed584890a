"""Which buffers a step's deltas live in: fixed ones for what is captured, others for the rest."""

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")
if torch.cuda.is_available():
    pytest.skip("with a GPU tests/gpu checks these kernels", allow_module_level=True)

from fader_adapters.kernels.cuda.lora_step import MAX_MEMBERS
from fader_adapters.kernels.cuda.lora_tables import DECODE_TILE, PREFILL_TILE, SHRINK, TILE
from fader_adapters.kernels.cuda.tiles import TileBuilder
from fader_adapters.spec import RowTerms, StepTerms
from tests.adapters.cuda.test_lora import COMPANY, SITES, TOLERANCE, Rig, error, mixed, rig
from tests.support.deltas import steps


@pytest.fixture(scope="module")
def shared() -> Rig:
    return mixed()


def test_decode_steps_live_at_fixed_addresses_whatever_they_hold(shared):
    seen = set()
    for rows, mix in itertools.product((17, 32, 25), ((0,), (0, 1, 2, 3), (4, 5))):
        terms = StepTerms(tuple(RowTerms(1, ((mix[i % len(mix)], 1.0),)) for i in range(rows)))
        step = shared.prepare(terms)
        shared.prepare(steps()["blends and prefill"])
        b = step.buffers
        tensors = (b.block, b.a_at, b.b_at, b.left, b.scale_at, b.z, b.gamma)
        (launch,) = step.launches
        grids = (step.bucket, launch.tiles, launch.cells, launch.buffers.cells)
        seen.add((*(t.data_ptr() for t in tensors), *(t.shape for t in tensors), *grids))
    assert len(seen) == 1


def test_the_same_rows_again_are_not_built_again(shared, monkeypatch):
    decode, mixed = steps()["all distinct"], steps()["blends and prefill"]
    built = shared.prepare(decode), shared.prepare(mixed)

    def fail(*_, **__):
        raise AssertionError

    monkeypatch.setattr(shared.kernels._builder, "build", fail)
    assert (shared.prepare(decode), shared.prepare(mixed)) == built
    with pytest.raises(AssertionError):
        shared.prepare(steps()["skewed"])


def test_a_step_tells_that_a_later_one_took_its_place(shared):
    first = shared.prepare(steps()["all distinct"])
    assert first.valid
    shared.prepare(steps()["blends and prefill"])
    assert first.valid, "in buffers of its own"
    second = shared.prepare(steps()["one adapter, every row"])
    assert (first.valid, second.valid) == (False, True)
    assert shared.prepare(steps()["one adapter, every row"]) is second
    shared.kernels.blank(shared.world.tables, 1)
    assert not second.valid


def test_a_decode_step_too_large_for_the_fixed_room_runs_outside_it():
    made = rig(entries=6, decode_rows=8)
    small = StepTerms((RowTerms(1, ((2, 1.0),)),))
    deep = StepTerms((RowTerms(1, ((2, 1.0), (0, 1.0), (1, 1.0), (3, 1.0))),) * 3)
    wide = StepTerms((RowTerms(1, ((0, 1.0),)),) * 9)
    for terms, bucket in ((small, 1), (deep, None), (wide, None), (small, 1)):
        assert made.prepare(terms).bucket == bucket
        assert error(made, terms, 0) < TOLERANCE


@pytest.mark.slow
def test_steps_of_few_prompts_live_at_fixed_addresses_once_room_is_reserved():
    made = rig(sites=SITES[:1])
    assert made.prepare(StepTerms((RowTerms(71, ((0, 1.0),)),))).prompt is None
    made.kernels.reserve_prompts(made.world.tables, (128, 256))
    blank = made.kernels.blank_prompt(made.world.tables, 256)
    seen = set()
    for rows, bucket in (((70,), 128), ((2, 9, 30), 128), ((130, 3), 256), ((64,) * 4, 256)):
        terms = StepTerms(tuple(RowTerms(n, ((i % 6, 1.0),)) for i, n in enumerate(rows)))
        step = made.prepare(terms)
        assert (step.prompt, step.bucket, step.covers) == (bucket, None, False)
        assert error(made, terms, 0) < TOLERANCE
        tensors = (step.buffers.block, step.buffers.z, step.buffers.gamma, step.buffers.b_at)
        (launch,) = step.launches
        grids = (launch.tiles, launch.cells) if bucket == 256 else ()
        seen.add((*(t.data_ptr() for t in tensors), *grids))
        if bucket == 256:
            assert grids == (blank.launches[0].tiles, blank.launches[0].cells)
    assert len(seen) == 2
    mine = ((0, 0.5), (1, -0.7))
    for rows in ((257,), (2,) * 40, (70, 1), (1,)):
        terms = StepTerms(tuple(RowTerms(n, mine) for n in rows))
        assert made.prepare(terms).prompt is None
        assert error(made, terms, 0) < TOLERANCE


def test_a_prompt_has_the_same_bits_in_either_room():
    made, terms = rig(sites=SITES[:1]), StepTerms((RowTerms(70, COMPANY[1]), RowTerms(9)))
    x, y = made.operands(terms, 0)
    before = made.run(terms, 0, x, y)
    made.kernels.reserve_prompts(made.world.tables, (128,))
    made.world.tables.generation += 1
    assert made.prepare(terms).prompt == 128
    assert torch.equal(made.run(terms, 0, x, y), before)


def test_the_second_room_grows_with_its_steps():
    made = rig(sites=SITES[:1])
    before = made.kernels.nbytes
    for rows in (1, 17):
        terms = StepTerms((RowTerms(65, ((0, 1.0),)),) * rows)
        assert made.prepare(terms).bucket is None
        assert made.kernels.nbytes > before
        before = made.kernels.nbytes
    assert error(made, terms, 0) < TOLERANCE


def in_pieces(made: Rig) -> Rig:
    """With room in the scratch for a list or two."""
    shapes = (replace(DECODE_TILE, most=8), replace(PREFILL_TILE, most=8))
    made.kernels._builder = TileBuilder(*shapes)
    return made


@pytest.mark.parametrize("which", [0, 1])
def test_a_step_in_pieces_has_the_bits_it_has_at_once(which):
    whole, pieces = mixed(), in_pieces(mixed())
    for name in ("blends and prefill", "all distinct"):
        terms = steps()[name]
        x, y = whole.operands(terms, which)
        assert torch.equal(pieces.run(terms, which, x, y), whole.run(terms, which, x, y))
        assert len(pieces.prepare(terms).launches) > len(whole.prepare(terms).launches)


def test_the_scratch_stops_growing_at_the_length_of_a_piece():
    made = rig([(512,)], sites=SITES[:1])
    sizes = []
    for tiles in (1, 33, 80, 200):
        terms = StepTerms((RowTerms(64 * tiles, ((0, 1.0),)),))
        step = made.kernels.prepare(made.world.tables, terms)
        assert step is not None
        assert sum(launch.tiles for launch in step.launches) == tiles
        assert all(launch.cells <= PREFILL_TILE.most for launch in step.launches)
        sizes.append(step.buffers.z.nbytes)
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3]
    planes = 2 * made.sites[0].configs.shrink["prefill"].splits
    assert sizes[3] == planes * PREFILL_TILE.most * PREFILL_TILE.rows * 16 * 4


def test_at_the_widest_site_the_scratch_is_64_mib():
    for phase, tile in TILE.items():
        splits = max(c.splits for (_, own), t in SHRINK.items() if own == phase for _, c in t)
        assert MAX_MEMBERS * splits * tile.most * tile.rows * 16 * 4 == 64 << 20
