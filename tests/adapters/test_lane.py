"""Merged weights: what they hold, what they cost, and that the base never notices."""

import math
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file, save_file

from fader_adapters.changes import Changes
from fader_adapters.errors import BlendInvalid
from fader_adapters.kernels import native, nf4
from fader_adapters.lane import MergedLane, Merger
from fader_adapters.layers import Site
from fader_adapters.merged_site import CHUNK, LaneSpec
from fader_adapters.spec import Blend
from tests.support.families import write_family
from tests.support.lanes import changes_of, merge, weights_hash
from tests.support.peft_adapters import write_adapter
from tests.support.world import TinyWorld

BLEND = {"one": 0.7, "two": -0.4}
BACKENDS = ["auto", "reference"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lane")
    source = write_family("llama", folder / "base")
    write_adapter(source, folder / "one", rank=8, seed=1)
    write_adapter(source, folder / "two", rank=4, seed=2, target_modules=["q_proj", "down_proj"])
    write_adapter(source, folder / "few", rank=4, seed=3, target_modules=["v_proj"])
    write_adapter(source, folder / "dora", rank=4, seed=4, use_dora=True)
    return folder


def world_of(folder: Path, backend="auto", dtype=torch.float32) -> TinyWorld:
    world = TinyWorld(folder / "base", backend=backend, dtype=dtype)
    for name in ("one", "two", "few", "dora"):
        world.load(name, folder / name)
    return world


@pytest.fixture(scope="module", params=BACKENDS)
def world(request: pytest.FixtureRequest, folder: Path) -> TinyWorld:
    return world_of(folder, request.param)


def dense_merge(changes: Changes, site: Site) -> torch.Tensor:
    """W' of a site, each member from fp64."""
    parts, start = [], 0
    base = site.kernel.base.dense(torch.float32)
    for linear, size in zip(site.spec.linears, site.spec.out_features, strict=True):
        weight = base[start : start + size].double()
        start += size
        change = changes.of(linear)
        if change is not None:
            gain = 0.0 if change.gain is None else change.gain.double()[:, None]
            weight = weight * (1 + gain) + change.delta.b.double() @ change.delta.a.double()
        parts.append(weight)
    return torch.cat(parts)


def pairs(merged: MergedLane):
    return [(site, base.dense(torch.float32)) for site, base in merged.weights.bases.items()]


@pytest.mark.parametrize("blend", [BLEND, {"dora": 1.0}, {"few": 1.0, "dora": -0.5}])
def test_plain_weights_are_the_sum_rounded_once(world: TinyWorld, blend):
    changes = changes_of(world, blend)
    for site, given in pairs(merge(world, blend, form="bf16")):
        expected = dense_merge(changes, site)
        assert float((given - expected).abs().max()) < 1e-6
        assert float((site.kernel.base.dense(torch.float32) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("blend", [BLEND, {"dora": 1.0}])
def test_plain_rounding_is_a_fresh_quantisation_code_by_code(world: TinyWorld, blend):
    changes = changes_of(world, blend)
    for site, given in pairs(merge(world, blend, form="nf4", rounding="plain")):
        start = 0
        base = site.kernel.base.dense(torch.float32)
        for linear, size in zip(site.spec.linears, site.spec.out_features, strict=True):
            change = changes.of(linear)
            own = base[start : start + size]
            wanted = own if change is None else change.of_weight(own, 0)
            packed, state = quantize_4bit(wanted.contiguous(), blocksize=64, quant_type="nf4")
            fresh = nf4.dense(nf4.from_state(packed, state), torch.float32)
            assert torch.equal(given[start : start + size], fresh)
            start += size
        assert not torch.equal(given, base)
    kept = dict(pairs(merge(world, blend, form="nf4", rounding="keep")))
    plain = dict(pairs(merge(world, blend, form="nf4", rounding="plain")))
    assert any(not torch.equal(kept[site], plain[site]) for site in kept)


def test_a_site_that_no_term_touches_shares_the_bases_weight(world: TinyWorld):
    merged = merge(world, {"few": 1.0}, form="nf4")
    installed = world.base.installed
    touched = [
        site
        for site in installed.sites
        if any("v_proj" in installed.spec.linears[i].path for i in site.spec.linears)
    ]
    assert set(merged.weights.bases) == set(touched)
    assert len(touched) < len(installed.sites)


def test_members_of_a_touched_site_that_no_term_touches_stay_exact(world: TinyWorld):
    for site, given in pairs(merge(world, {"few": 1.0}, form="nf4")):
        base = site.kernel.base.dense(torch.float32)
        q, k, _ = site.spec.out_features
        assert torch.equal(given[: q + k], base[: q + k])
        assert not torch.equal(given[q + k :], base[q + k :])


@pytest.mark.parametrize("form", ["nf4", "bf16"])
def test_what_a_lane_needs_is_known_before(folder: Path, form):
    world = world_of(folder, dtype=torch.bfloat16)
    changes = changes_of(world, BLEND)
    spec = LaneSpec(changes.blend, form, "keep")
    base = world.base
    merger = Merger(
        base.installed, base.backend, changes, spec, dtype=base.dtype, device=base.device
    )
    told: list[int] = []
    merged = merger.run(told.append, lambda: None)
    assert 0.9 * merger.need.lane <= merged.weights.nbytes <= merger.need.lane
    assert told == sorted(told)
    assert told[-1] == merger.weights
    assert 0 < merger.need.scratch <= 6 * 4 * CHUNK + 4 * base.installed.nbytes


def test_the_loss_is_that_of_the_dense_weights(world: TinyWorld):
    changes = changes_of(world, BLEND)
    merged = merge(world, BLEND, form="nf4")
    by_path = {loss.path: loss for loss in merged.losses}
    linears = world.base.installed.spec.linears
    assert list(by_path) == [linears[i].path for i in sorted(changes.linears())]
    for site, given in pairs(merged):
        start = 0
        base, wanted = site.kernel.base.dense(torch.float32), dense_merge(changes, site)
        for linear, size in zip(site.spec.linears, site.spec.out_features, strict=True):
            rows = slice(start, start + size)
            start += size
            loss = by_path[linears[linear].path]
            error, delta = given[rows] - wanted[rows], wanted[rows] - base[rows]
            assert loss.error_norm == pytest.approx(float(error.norm()), rel=1e-4)
            assert loss.delta_norm == pytest.approx(float(delta.norm()), rel=1e-4)
    exact = merge(world, BLEND, form="bf16").report["overall"]["relative_error"]
    assert exact < 1e-5 < merged.report["overall"]["relative_error"]


@pytest.mark.parametrize("form", ["nf4", "bf16"])
def test_the_product_of_some_rows_is_that_of_their_weights(world: TinyWorld, form):
    for base in merge(world, BLEND, form=form).weights.bases.values():
        x = torch.randn(3, base.in_features)
        wanted = x.double() @ base.dense(torch.float32).double().T
        for start, stop in ((0, base.out_features), (5, 40), (32, 64), (7, 8)):
            given = base.product(x, start, stop)
            assert given.dtype == torch.float32
            assert float((given - wanted[:, start:stop]).abs().max()) < 1e-5
        assert float((base.product(x, 0, 32) - wanted[:, 1:33]).abs().max()) > 1e-3


@pytest.mark.parametrize("form", ["nf4", "bf16"])
def test_a_delta_too_small_to_change_its_weight_loses_nothing(tmp_path: Path, form):
    source = write_family("llama", tmp_path / "base")
    tiny = write_adapter(source, tmp_path / "tiny", rank=4, seed=1) / "adapter_model.safetensors"
    tensors = load_file(tiny)
    for name in tensors:
        if "layers.0" in name and "lora_B" in name:
            tensors[name].fill_(1e-30)
    save_file(tensors, tiny, metadata={"format": "pt"})
    world = TinyWorld(source)
    world.load("tiny", tmp_path / "tiny")
    report = merge(world, {"tiny": 1.0}, form=form).report
    lost = [item for item in report["linears"] if not item["delta_norm"]]
    assert {item["survival"] for item in lost} == {1.0}
    assert {item["relative_error"] for item in lost} == {0.0}
    assert len(lost) == len(report["linears"]) / 2
    assert report["overall"]["delta_norm"] > 0
    assert math.isfinite(report["overall"]["survival"])


def test_a_blend_that_changes_nothing_is_refused(world: TinyWorld):
    with pytest.raises(BlendInvalid, match="changes no linear"):
        Merger(
            world.base.installed,
            world.base.backend,
            Changes(Blend(), {}, world.base.installed.spec),
            LaneSpec(Blend(), "nf4", "keep"),
            dtype=torch.float32,
            device=world.base.device,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_base_is_the_same_after_a_hundred_merges(folder: Path, backend):
    world = world_of(folder, backend)
    before = weights_hash(world.base.installed)
    names = ["one", "two", "few", "dora"]
    for i in range(100):
        blend = {names[i % 4]: 1.0 + i / 100, names[(i + 1) % 4]: -0.5}
        merge(world, blend, form="nf4" if i % 2 else "bf16", rounding="keep")
    assert weights_hash(world.base.installed) == before
    base = world.base.installed.sites[0].kernel.base
    panels = getattr(base, "panels", None)
    scales = base.weight.absmax if panels is None else panels.scales
    scales.view(-1)[0] += 1e-3
    assert weights_hash(world.base.installed) != before


@pytest.mark.skipif(not native.available(), reason=native.reason() or "built")
def test_a_merge_leaves_the_kernels_team_to_the_others(folder: Path, monkeypatch):
    world = world_of(folder)
    used: list[int] = []
    real = native.threads
    quantise = sys.modules["fader_adapters.kernels.native.quantise"]
    monkeypatch.setattr(quantise, "threads", lambda: used.append(real()) or real())
    native.set_threads(2)
    try:
        merge(world, BLEND, form="nf4")
        assert used
        assert set(used) == {1}
        assert real() == 2, "only inside the merge"
    finally:
        native.set_threads(None)
