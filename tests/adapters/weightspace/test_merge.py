import json

import bitsandbytes as bnb
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fader_adapters.errors import (
    AdapterMismatch,
    BaseUnsupported,
    BlendInvalid,
    CheckpointInvalid,
    TargetTaken,
)
from fader_adapters.kernels import native
from fader_adapters.weightspace.base import open_base
from fader_adapters.weightspace.merge import merge
from fader_adapters.weightspace.terms import Ingredient, mix, read_raw
from tests.adapters.weightspace import models
from tests.support.families import write_family

FAMILIES = ("llama", "gpt2", "qwen3", "phi3")
"""Biases and a head of its own; Conv1D and a tied head; tied; fused projections."""
SHARD = 150_000


def blend(made) -> list[Ingredient]:
    return [Ingredient(made.tone, 0.7), Ingredient(made.domain, -0.2)]


def reference(made, **changed):
    return models.peft_merge(
        made.base, {item.path: changed.get(item.path.name, item.gamma) for item in blend(made)}
    )


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, files):
    return files(request.param)


def test_bf16_merge_is_pefts_rounded_once(family, tmp_path):
    done = merge(family.base, blend(family), tmp_path / "out", form="bf16", shard_bytes=SHARD)
    assert done.shards > 2
    mine = models.load(tmp_path / "out").state_dict()
    theirs = reference(family).state_dict()
    other = reference(family, tone=0.71).state_dict()
    base = models.load(family.base).state_dict()
    touched = {loss["path"] + ".weight" for loss in done.report["linears"]}
    for name, weight in theirs.items():
        assert mine[name].dtype == torch.bfloat16
        if name in touched:
            assert not torch.equal(mine[name], base[name].bfloat16())
            assert (mine[name] != weight.bfloat16()).float().mean() < 1e-3
            torch.testing.assert_close(mine[name].float(), weight, rtol=2**-8, atol=1e-7)
            assert (mine[name] != other[name].bfloat16()).float().mean() > 0.01
        else:
            assert torch.equal(mine[name], base[name].bfloat16())


def test_bf16_merge_gives_the_merged_logits(family, tmp_path):
    merge(family.base, blend(family), tmp_path / "out", form="bf16")
    weights = {item.path: item.gamma for item in blend(family)}
    models.peft_merge(family.base, weights, tmp_path / "peft")
    wanted = models.logits(models.load(tmp_path / "peft", dtype=torch.bfloat16))
    found = models.logits(models.load(tmp_path / "out"))
    unmerged = models.logits(models.load(family.base, dtype=torch.bfloat16))
    assert (found - wanted).abs().max() < 0.05 * (unmerged - wanted).abs().max()


def test_nf4_merge_is_a_fresh_quantisation_of_the_dense_merge_code_by_code(family, tmp_path):
    done = merge(family.base, blend(family), tmp_path / "out", form="nf4", shard_bytes=SHARD)
    assert done.shards > 1
    base, peft = models.load(family.base), reference(family)
    spec = open_base(family.base).spec
    mixture = mix(read_raw(blend(family)), [item.gamma for item in blend(family)], spec)
    codes = flips = 0
    for path, module in models.load(tmp_path / "out").named_modules():
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        conv1d = spec.linears[spec.index_of[path]].conv1d
        dense, theirs = (m.get_submodule(path).weight.data for m in (base, peft))
        dense, theirs = (w.T.contiguous() if conv1d else w for w in (dense, theirs))
        delta = mixture.sum(spec.index_of[path])
        dense = dense if delta is None else torch.addmm(dense, delta.b, delta.a)
        packed, state = quantised(dense)
        assert torch.equal(module.weight.data, packed)
        assert torch.equal(module.weight.quant_state.absmax, state.absmax)
        assert torch.equal(module.weight.quant_state.state2.absmax, state.state2.absmax)
        assert module.weight.quant_state.dtype == torch.float32
        assert not torch.equal(module.weight.data, quantised(dense + 0.01)[0])
        # PEFT adds in another order: a sum that lies on a boundary may fall to its other side
        flips += int((packed != quantised(theirs)[0]).sum())
        codes += packed.numel()
    assert flips <= 1e-5 * codes + 1
    assert codes > 10_000


def quantised(dense):
    return bnb.functional.quantize_4bit(
        dense, blocksize=64, compress_statistics=True, quant_type="nf4"
    )


def test_nf4_merge_gives_the_logits_of_the_merge_that_transformers_quantises(family, tmp_path):
    merge(family.base, blend(family), tmp_path / "out", form="nf4")
    models.peft_merge(
        family.base, {item.path: item.gamma for item in blend(family)}, tmp_path / "peft"
    )
    wanted = models.logits(models.load(tmp_path / "peft", quantise=True))
    found = models.logits(models.load(tmp_path / "out"))
    unmerged = models.logits(models.load(family.base, quantise=True))
    assert (found - wanted).abs().max() < 0.05 * (unmerged - wanted).abs().max()


def test_without_the_native_library_the_bytes_are_the_same(files, tmp_path, monkeypatch):
    made = files("llama")
    merge(made.base, [Ingredient(made.tone)], tmp_path / "native", form="nf4")
    monkeypatch.setattr(native, "available", lambda: False)
    merge(made.base, [Ingredient(made.tone)], tmp_path / "plain", form="nf4")
    mine, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("native", "plain"))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module", params=("llama", "gpt2"))
def nf4_base(request, files, tmp_path_factory):
    """The family with its base in NF4, as transformers writes it in several files."""
    made = files(request.param)
    target = tmp_path_factory.mktemp("nf4") / "base"
    models.load(made.base, quantise=True).save_pretrained(target, max_shard_size="100KB")
    assert len(list(target.glob("*.safetensors"))) > 1
    return made, target


def test_nf4_base_merges_to_bf16_from_its_decoded_weights(nf4_base, tmp_path):
    made, base = nf4_base
    done = merge(base, [Ingredient(made.domain, 0.5)], tmp_path / "out", form="bf16")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    touched = {loss["path"] for loss in done.report["linears"]}
    assert 0 < len(touched) < len(models.load(base).state_dict())
    mine = models.load(tmp_path / "out")
    for path, module in models.load(base).named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            dense = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            found = mine.get_submodule(path).weight
            found = found.T if found.shape != dense.shape or "gpt2" in str(made.base) else found
            assert torch.equal(found, dense.bfloat16()) == (path not in touched)


def test_nf4_base_to_nf4_requantises_only_what_the_adapter_touches(nf4_base, tmp_path):
    made, base = nf4_base
    done = merge(base, [Ingredient(made.domain, 4.0)], tmp_path / "out", form="nf4")
    before, after = (dict(models.load(p).named_modules()) for p in (base, tmp_path / "out"))
    touched = {loss["path"] for loss in done.report["linears"]}
    quantised = {p for p, m in before.items() if isinstance(m, bnb.nn.Linear4bit)}
    for path in quantised:
        same = torch.equal(before[path].weight.data, after[path].weight.data)
        assert same == (path not in touched), path
    assert touched < quantised


def test_report_tells_what_rounding_costs(files, tmp_path):
    made = files("llama")
    reports = {
        form: merge(made.base, blend(made), tmp_path / form, form=form).report
        for form in ("bf16", "nf4")
    }
    assert json.loads((tmp_path / "nf4/merge_report.json").read_text()) == reports["nf4"]
    path = "model.layers.1.self_attn.q_proj"
    loss = next(item for item in reports["nf4"]["linears"] if item["path"] == path)
    merged = reference(made).get_submodule(path).weight.data
    module = models.load(tmp_path / "nf4").get_submodule(path)
    written = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    delta = merged - models.load(made.base).get_submodule(path).weight.data
    ratio = float(torch.linalg.norm(written - merged) / torch.linalg.norm(delta))
    assert loss["relative_error"] == pytest.approx(ratio, rel=1e-3)
    assert loss["rank"] == 12
    small, large = (reports[form]["overall"] for form in ("bf16", "nf4"))
    assert small["relative_error"] < 0.1 < large["relative_error"]
    assert small["survival"] == pytest.approx(1.0, abs=0.01)


def test_small_delta_on_an_nf4_base_is_told_to_be_lost(files, tmp_path):
    made = files("llama")
    base = tmp_path / "base"
    models.load(made.base, quantise=True).save_pretrained(base)
    weak = merge(base, [Ingredient(made.tone, 0.01)], tmp_path / "weak", form="nf4").report
    strong = merge(base, [Ingredient(made.tone, 8.0)], tmp_path / "strong", form="nf4").report
    assert weak["overall"]["survival"] < 0.2 < 0.9 < strong["overall"]["survival"]


def test_bf16_base_keeps_its_dtype_in_nf4(files, tmp_path):
    made = files("llama")
    models.load(made.base, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    merge(tmp_path / "base", [Ingredient(made.tone)], tmp_path / "out", form="nf4")
    model = models.load(tmp_path / "out")
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["bf16", "nf4"])
def test_keys_without_the_models_prefix_are_found_and_load_again(files, tmp_path, form):
    made = files("gpt2")

    def strip(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)

    bare = models.rewrite(made.base, tmp_path / "bare", strip)
    merge(bare, [Ingredient(made.tone)], tmp_path / "out", form=form)
    merge(made.base, [Ingredient(made.tone)], tmp_path / "usual", form=form)
    found, usual = (models.logits(models.load(tmp_path / name)) for name in ("out", "usual"))
    assert torch.equal(found, usual)
    assert not torch.equal(found, models.logits(models.load(bare)))


def test_sharded_input_gives_the_same_bytes_as_one_file(files, tmp_path):
    made = files("qwen3")
    models.load(made.base).save_pretrained(tmp_path / "base", max_shard_size="100KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    merge(tmp_path / "base", [Ingredient(made.tone)], tmp_path / "many", form="nf4")
    merge(made.base, [Ingredient(made.tone)], tmp_path / "one", form="nf4")
    many, one = (load_file(tmp_path / n / "model.safetensors") for n in ("many", "one"))
    assert many.keys() == one.keys()
    assert all(torch.equal(many[name], one[name]) for name in one)
    assert not any("lm_head" in name for name in one), "a tied head is not written"


def test_shards_index_and_surroundings_are_complete(files, tmp_path):
    made = files("llama")
    (made.base / "tokenizer_config.json").write_text("{}")
    (made.base / "modeling_evil.py").write_text("boom")
    done = merge(made.base, [Ingredient(made.tone)], tmp_path / "o", form="bf16", shard_bytes=SHARD)
    index = json.loads((tmp_path / "o/model.safetensors.index.json").read_text())
    held = {}
    for file in (tmp_path / "o").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            held |= dict.fromkeys(opened.keys(), file.name)
    assert held == index["weight_map"]
    assert len(set(held.values())) == done.shards
    names = {path.name for path in (tmp_path / "o").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer_config.json"} <= names
    assert not any(name.endswith((".part", ".py")) for name in names)
    config = json.loads((tmp_path / "o/config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_adapter_of_another_base_is_refused_by_name_and_nothing_is_written(files, tmp_path):
    with pytest.raises(AdapterMismatch, match=r"tone: .*down_proj.*another base"):
        merge(files("gpt2").base, [Ingredient(files("llama").tone)], tmp_path / "out", form="bf16")
    wide = write_family("mistral", tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    assert config["hidden_size"] == 128
    with pytest.raises(AdapterMismatch, match=r"domain: .*c_attn"):
        merge(wide, [Ingredient(files("gpt2").domain)], tmp_path / "out", form="nf4")
    assert not (tmp_path / "out").exists()


def test_impossible_blends_are_refused(files, tmp_path):
    made = files("llama")
    for terms in ([], [Ingredient(made.tone, 0.0)], [Ingredient(made.tone)] * 2):
        with pytest.raises(BlendInvalid):
            merge(made.base, terms, tmp_path / "out", form="bf16")
    with pytest.raises(BlendInvalid, match="tone"):
        Ingredient(made.tone, float("nan"))
    with pytest.raises(TargetTaken, match="base itself"):
        merge(made.base, [Ingredient(made.tone)], made.base, form="bf16")


def test_damaged_bases_are_refused_by_name(files, tmp_path):
    made = files("llama")

    def lose(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]

    def poison(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")

    for name, change in (("lost", lose), ("inf", poison)):
        for form in ("bf16", "nf4"):
            base = models.rewrite(made.base, tmp_path / f"{name}-{form}", change)
            with pytest.raises(CheckpointInvalid, match=r"layers\.1\.mlp\.up_proj"):
                merge(base, [Ingredient(made.tone)], tmp_path / "out" / name / form, form=form)
    cut = models.rewrite(made.base, tmp_path / "cut", lambda tensors: None)
    with (cut / "model.safetensors").open("r+b") as file:
        file.truncate((cut / "model.safetensors").stat().st_size - 1)
    with pytest.raises(CheckpointInvalid, match="truncated"):
        merge(cut, [Ingredient(made.tone)], tmp_path / "out" / "cut", form="bf16")
    config = json.loads((made.base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm"}
    other = models.rewrite(made.base, tmp_path / "other", lambda tensors: None)
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseUnsupported, match="aqlm"):
        merge(other, [Ingredient(made.tone)], tmp_path / "out" / "other", form="bf16")
