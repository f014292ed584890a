import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fader_adapters.errors import (
    AdapterInvalid,
    AdapterMismatch,
    BlendInvalid,
    DeltaEmpty,
    TargetTaken,
)
from fader_adapters.weightspace.base import open_base
from fader_adapters.weightspace.compress import compress
from fader_adapters.weightspace.terms import Ingredient
from tests.adapters.weightspace import models
from tests.support.peft_adapters import write_adapter


def blend(made):
    return [Ingredient(made.tone, 0.7), Ingredient(made.domain, -0.2)]


def merged(made):
    return models.logits(models.peft_merge(made.base, {i.path: i.gamma for i in blend(made)}))


def deltas(path) -> dict[str, torch.Tensor]:
    tensors = load_file(path / "adapter_model.safetensors")
    return {
        name.removesuffix(".lora_A.weight"): tensors[name.replace("lora_A", "lora_B")] @ tensor
        for name, tensor in tensors.items()
        if "lora_A" in name
    }


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_where_the_rank_allows_one_adapter_is_the_blend_exactly(files, tmp_path, family, checked):
    made = files(family)
    base = open_base(made.base).spec if checked else None
    done = compress(blend(made), tmp_path / "out", rank=12, base=base)
    assert {site["method"] for site in done.report["linears"]} == {"concatenated"}
    assert done.report["overall"]["error_norm"] == 0.0
    assert {site["rank"] for site in done.report["linears"]} == {4, 12}
    found = models.adapted(made.base, tmp_path / "out")
    torch.testing.assert_close(found, merged(made), rtol=1e-4, atol=1e-4)
    alone = models.adapted(made.base, made.tone)
    assert (found - alone).abs().max() > 0.01


def test_below_the_rank_the_error_is_the_tail_of_the_products_singular_values(files, tmp_path):
    made = files("llama")
    full = compress(blend(made), tmp_path / "full", rank=12)
    done = compress(blend(made), tmp_path / "out", rank=5)
    whole, kept = deltas(tmp_path / "full"), deltas(tmp_path / "out")
    assert full.report["digest"] == done.report["digest"]
    methods = {site["path"]: site for site in done.report["linears"]}
    assert {site["method"] for site in methods.values()} == {"concatenated", "svd"}
    for path, site in methods.items():
        delta = whole["base_model.model." + path]
        found = float(torch.linalg.norm(delta - kept["base_model.model." + path]))
        sigma = torch.linalg.svdvals(delta.double())
        tail = float(torch.linalg.vector_norm(sigma[5:]))
        if site["method"] == "svd":
            assert site["rank"] == 5
            assert site["error_norm"] == pytest.approx(tail, rel=1e-5)
            assert found == pytest.approx(tail, rel=1e-4)
            assert found < 0.99 * float(torch.linalg.vector_norm(sigma[4:]))
        else:
            assert found == site["error_norm"] == 0.0
    models.adapted(made.base, tmp_path / "out")


def test_rank_of_the_sum_beyond_the_matrix_is_exact_by_svd(files, tmp_path):
    made = files("llama")
    wide = write_adapter(made.base, tmp_path / "wide", rank=80, seed=5, target_modules=["k_proj"])
    more = write_adapter(made.base, tmp_path / "more", rank=80, seed=6, target_modules=["k_proj"])
    terms = [Ingredient(wide), Ingredient(more)]
    done = compress(terms, tmp_path / "out", rank=100)
    assert {site["rank"] for site in done.report["linears"]} == {64}
    assert done.report["overall"]["relative_error"] < 1e-10
    wanted = models.logits(models.peft_merge(made.base, {wide: 1.0, more: 1.0}))
    found = models.adapted(made.base, tmp_path / "out")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_one_adapter_shrinks_to_its_best_lower_rank(files, tmp_path):
    made = files("llama")
    done = compress([Ingredient(made.domain)], tmp_path / "out", rank=2)
    assert 0.0 < done.report["overall"]["relative_error"] < 1.0
    assert {site["rank"] for site in done.report["linears"]} == {2}


def test_rslora_and_patterns_are_folded_into_the_factors(files, tmp_path):
    made = files("llama")
    odd = write_adapter(
        made.base,
        tmp_path / "odd",
        rank=8,
        seed=9,
        use_rslora=True,
        target_modules=["q_proj", "k_proj"],
        rank_pattern={"k_proj": 3},
        alpha_pattern={"q_proj": 5},
    )
    done = compress([Ingredient(odd)], tmp_path / "out", rank=8)
    assert {site["rank"] for site in done.report["linears"]} == {3, 8}
    wanted = models.adapted(made.base, odd)
    found = models.adapted(made.base, tmp_path / "out")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    # PEFT's own `cat` forgets rsLoRA, so the sum is compared with the parts
    compress([Ingredient(odd, 2.0), Ingredient(made.tone, 0.5)], tmp_path / "sum", rank=16)
    compress([Ingredient(made.tone)], tmp_path / "tone", rank=4)
    both, one, other = (deltas(tmp_path / name) for name in ("sum", "out", "tone"))
    for path, delta in both.items():
        wanted = 2.0 * one.get(path, 0.0) + 0.5 * other[path]
        torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=1e-6)


def test_terms_that_cancel_leave_nothing_to_write(files, tmp_path):
    made = files("llama")
    twin = tmp_path / "twin"
    twin.mkdir()
    (twin / "adapter_config.json").write_bytes((made.tone / "adapter_config.json").read_bytes())
    tensors = load_file(made.tone / "adapter_model.safetensors")
    for name in tensors:  # the same product in other factors: another version
        tensors[name] = tensors[name] * (2.0 if "lora_A" in name else 0.5)
    save_file(tensors, twin / "adapter_model.safetensors")
    with pytest.raises(DeltaEmpty, match="cancel"):
        compress([Ingredient(made.tone), Ingredient(twin, -1.0)], tmp_path / "out", rank=8)
    assert not (tmp_path / "out").exists()
    done = compress([Ingredient(made.tone), Ingredient(twin, -0.5)], tmp_path / "out", rank=8)
    assert done.report["overall"]["linears"] == 14


def test_adapters_of_different_bases_are_refused_by_name(files, tmp_path):
    llama, gpt2 = files("llama"), files("gpt2")
    spec = open_base(llama.base).spec
    with pytest.raises(AdapterMismatch, match=r"tone: .*c_attn"):
        compress([Ingredient(gpt2.tone)], tmp_path / "out", rank=8, base=spec)
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    config = (llama.tone / "adapter_config.json").read_bytes()
    (narrow / "adapter_config.json").write_bytes(config)
    tensors = load_file(llama.tone / "adapter_model.safetensors")
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    tensors[name] = tensors[name][:, :64].contiguous()
    save_file(tensors, narrow / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatch, match=r"narrow: .*q_proj' maps 64 to 128 .* 128 to 128"):
        compress([Ingredient(llama.tone), Ingredient(narrow)], tmp_path / "out", rank=8)


def test_one_linear_under_two_names_is_refused_unless_the_base_is_named(files, tmp_path):
    made = files("llama")
    bare = tmp_path / "bare"
    bare.mkdir()
    config = json.loads((made.tone / "adapter_config.json").read_text())
    config["target_modules"] = sorted({n.rpartition(".")[2] for n in config["target_modules"]})
    (bare / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(made.tone / "adapter_model.safetensors")
    renamed = {name.replace("model.layers", "layers"): 2 * t for name, t in tensors.items()}
    save_file(renamed, bare / "adapter_model.safetensors")
    terms = [Ingredient(made.tone), Ingredient(bare)]
    with pytest.raises(AdapterMismatch, match=r"two names.*--base"):
        compress(terms, tmp_path / "out", rank=8)
    done = compress(terms, tmp_path / "out", rank=8, base=open_base(made.base).spec)
    assert done.report["overall"]["linears"] == 14


def test_impossible_requests_are_refused(files, tmp_path):
    made = files("llama")
    with pytest.raises(BlendInvalid):
        compress([], tmp_path / "out", rank=8)
    with pytest.raises(BlendInvalid, match="rank"):
        compress(blend(made), tmp_path / "out", rank=0)
    with pytest.raises(BlendInvalid, match="twice"):
        compress([Ingredient(made.tone)] * 2, tmp_path / "out", rank=8)
    with pytest.raises(TargetTaken):
        compress(blend(made), made.tone, rank=8)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/adapter_config.json").write_text("{}")
    (tmp_path / "broken/adapter_model.safetensors").write_bytes(b"\2" + bytes(7) + b"{}")
    with pytest.raises(AdapterInvalid, match="broken"):
        compress([Ingredient(tmp_path / "broken")], tmp_path / "out", rank=8)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("kind", [{"use_dora": True}, {"trainable_token_indices": [3]}])
def test_what_changes_the_bases_own_rows_is_refused_by_name(files, tmp_path, kind, checked):
    made = files("llama")
    own = write_adapter(made.base, tmp_path / "own", rank=2, seed=1, **kind)
    base = open_base(made.base).spec if checked else None
    with pytest.raises(AdapterInvalid, match=f"{next(iter(kind))}.* rows of the base.*merge the b"):
        compress([Ingredient(own)], tmp_path / "out", rank=4, base=base)
