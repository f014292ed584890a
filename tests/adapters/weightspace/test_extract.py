import json
import math
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from fader_adapters.errors import (
    AdapterMismatch,
    AdapterTooLarge,
    BlendInvalid,
    DeltaEmpty,
    TargetTaken,
)
from fader_adapters.targets import ALL_LINEAR, Targets
from fader_adapters.weightspace.extract import extract
from tests.adapters.weightspace import models
from tests.support.families import write_family

Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.1.self_attn.k_proj.weight"


def planted(*, rank=3, keys=(Q, K), scale=0.02):
    def change(tensors):
        for i, key in enumerate(keys):
            g = torch.Generator().manual_seed(i)
            out, width = tensors[key].shape
            b, a = (torch.randn(s, generator=g) for s in ((out, rank), (rank, width)))
            tensors[key] += scale * b @ a

    return change


def factors(path, key):
    """ΔW of a written adapter, [out, in]."""
    tensors = load_file(path / "adapter_model.safetensors")
    name = "base_model.model." + key.removesuffix(".weight")
    return tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_adapter_of_a_planted_delta_gives_the_fine_tunes_logits_in_peft(files, tmp_path, family):
    """GPT-2: Conv1D, whose weight is [in, out]. Qwen3: a tied head."""
    base = files(family).base
    all_keys = load_file(base / "model.safetensors")
    keys = [k for k in all_keys if all_keys[k].ndim == 2 and re.search(r"layers|\.h\.", k)]
    tuned = models.rewrite(base, tmp_path / "tuned", planted(keys=keys[::2]))
    done = extract(tuned, base, tmp_path / "out", rank=3)
    assert done.report["overall"]["relative_error"] < 1e-5
    assert done.lost == ()
    assert done.report["unchanged"] == len(keys) - len(keys[::2])
    wanted = models.logits(models.load(tuned, dtype=torch.float32))
    found = models.adapted(base, tmp_path / "out")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    plain = models.logits(models.load(base, dtype=torch.float32))
    assert (plain - wanted).abs().max() > 0.01


def test_recovers_a_planted_delta_to_1e_5_and_skips_the_rest(files, tmp_path):
    base = files("llama").base
    tuned = models.rewrite(base, tmp_path / "tuned", planted())
    extract(tuned, base, tmp_path / "out", rank=3)
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    for key in (Q, K):
        delta = after[key] - before[key]
        assert torch.linalg.norm(factors(tmp_path / "out", key) - delta) <= 1e-5 * delta.norm()
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 4
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(key.removesuffix(".weight") for key in (Q, K))


def test_error_per_site_is_the_tail_of_its_singular_values(files, tmp_path):
    base = files("llama").base
    tuned = models.rewrite(base, tmp_path / "tuned", planted(rank=9))
    done = extract(tuned, base, tmp_path / "out", rank=4)
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    tails = []
    for key, site in zip((Q, K), done.report["linears"], strict=True):
        sigma = torch.linalg.svdvals((after[key] - before[key]).double())
        tails.append(float(torch.linalg.vector_norm(sigma[4:])))
        assert site["path"] + ".weight" == key
        assert site["error_norm"] == pytest.approx(tails[-1], rel=1e-4)
        assert site["error_norm"] > 2 * float(torch.linalg.vector_norm(sigma[9:]))
        assert site["singular_values"] == pytest.approx(sigma[:4].tolist(), rel=1e-6)
    assert done.report["overall"]["error_norm"] == pytest.approx(math.hypot(*tails), rel=1e-4)
    assert json.loads((tmp_path / "out/extract_report.json").read_text()) == done.report


def test_rank_beyond_the_matrices_is_cut_per_linear_and_exact(files, tmp_path):
    base = files("llama").base
    up = "model.layers.0.mlp.up_proj.weight"  # [192, 128]; k_proj is [64, 128]
    tuned = models.rewrite(base, tmp_path / "tuned", planted(rank=200, keys=(K, up), scale=0.002))
    done = extract(tuned, base, tmp_path / "out", rank=500)
    ranks = {site["path"] + ".weight": site["rank"] for site in done.report["linears"]}
    assert ranks == {K: 64, up: 128}
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 128
    assert config["rank_pattern"] == config["alpha_pattern"] == {K.removesuffix(".weight"): 64}
    wanted = models.logits(models.load(tuned, dtype=torch.float32))
    torch.testing.assert_close(models.adapted(base, tmp_path / "out"), wanted, rtol=1e-4, atol=1e-4)


def test_what_no_adapter_carries_is_named(files, tmp_path):
    base = files("llama").base

    def change(tensors):
        planted()(tensors)
        tensors["model.norm.weight"] *= 2
        tensors["model.layers.0.self_attn.q_proj.bias"] += 1
        tensors["model.embed_tokens.weight"] = torch.cat(
            [tensors["model.embed_tokens.weight"], torch.zeros(1, 128)]
        )
        tensors["lm_head.weight"][0, 0] += 1

    tuned = models.rewrite(base, tmp_path / "tuned", change)
    done = extract(tuned, base, tmp_path / "out", rank=3)
    found = {item.name: (item.kind, item.relative_norm) for item in done.lost}
    assert found.keys() == {
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    assert found["model.norm.weight"] == ("changed", pytest.approx(1.0))
    assert found["model.embed_tokens.weight"] == ("another shape", None)
    assert {item["name"] for item in done.report["not_carried"]} == found.keys()


def test_selection_takes_only_what_was_asked_and_names_the_rest(files, tmp_path):
    base = files("llama").base
    tuned = models.rewrite(base, tmp_path / "tuned", planted())
    for number, targets in enumerate(
        (Targets(frozenset({"q_proj"})), Targets(ALL_LINEAR, frozenset({"k_proj"})))
    ):
        out = tmp_path / str(number)
        done = extract(tuned, base, out, rank=3, targets=targets)
        assert [site["path"] + ".weight" for site in done.report["linears"]] == [Q]
        assert [item.name for item in done.lost] == [K]
    with pytest.raises(AdapterMismatch, match=r"'w_proj'.*q_proj"):
        extract(tuned, base, tmp_path / "no", rank=3, targets=Targets(frozenset({"w_proj"})))
    with pytest.raises(DeltaEmpty):
        extract(tuned, base, tmp_path / "no", rank=3, targets=Targets(frozenset({"v_proj"})))
    assert not (tmp_path / "no").exists()


def test_identical_models_are_refused(files, tmp_path):
    base = files("qwen3").base
    same = models.rewrite(base, tmp_path / "same", lambda tensors: None)
    with pytest.raises(DeltaEmpty, match="equals the base in 14 of 14"):
        extract(same, base, tmp_path / "out", rank=4)

    def nudge(tensors):
        tensors["model.norm.weight"] += 1

    normed = models.rewrite(base, tmp_path / "normed", nudge)
    with pytest.raises(DeltaEmpty, match=r"differs in 'model\.norm\.weight'"):
        extract(normed, base, tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()


def test_another_model_is_refused_by_name(files, tmp_path):
    base = files("llama").base
    with pytest.raises(AdapterMismatch, match=r"gpt2.*llama"):
        extract(files("gpt2").base, base, tmp_path / "out", rank=4)

    def thinner(tensors):
        for key in list(tensors):
            if key.startswith("model.layers.1."):
                del tensors[key]

    short = models.rewrite(base, tmp_path / "short", thinner)
    config = json.loads((short / "config.json").read_text()) | {"num_hidden_layers": 1}
    (short / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterMismatch, match=r"layers\.1\..* absent"):
        extract(short, base, tmp_path / "out", rank=4)


def test_impossible_ranks_and_targets_are_refused(files, tmp_path):
    base = files("llama").base
    tuned = models.rewrite(base, tmp_path / "tuned", planted())
    with pytest.raises(BlendInvalid, match="rank"):
        extract(tuned, base, tmp_path / "out", rank=0)
    with pytest.raises(AdapterTooLarge, match="512"):
        extract(tuned, base, tmp_path / "out", rank=513)
    with pytest.raises(TargetTaken):
        extract(tuned, base, base, rank=4)


def test_base_in_nf4_and_other_dtypes_and_files_are_read_as_they_are(files, tmp_path):
    base = files("llama").base
    tuned = models.rewrite(base, tmp_path / "tuned", planted(scale=0.2))
    models.load(base, quantise=True).save_pretrained(tmp_path / "nf4", max_shard_size="100KB")
    extract(
        tuned, tmp_path / "nf4", tmp_path / "out", rank=128, targets=Targets(frozenset({"q_proj"}))
    )
    module = models.load(tmp_path / "nf4").model.layers[0].self_attn.q_proj
    from bitsandbytes.functional import dequantize_4bit

    dense = dequantize_4bit(module.weight.data, module.weight.quant_state)
    wanted = load_file(tuned / "model.safetensors")[Q] - dense
    torch.testing.assert_close(factors(tmp_path / "out", Q), wanted, rtol=1e-4, atol=1e-5)

    models.load(tuned, dtype=torch.bfloat16).save_pretrained(tmp_path / "b", max_shard_size="100KB")
    done = extract(tmp_path / "b", base, tmp_path / "out16", rank=3)
    assert done.report["overall"]["linears"] == 14, "rounding to bf16 changes every linear"


def test_fader_reads_what_extract_writes(files, tmp_path):
    from fader_adapters.notebook import attach

    base = files("gpt2").base
    keys = [f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1)]
    tuned = models.rewrite(base, tmp_path / "tuned", planted(keys=keys))
    extract(tuned, base, tmp_path / "out", rank=3)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["target_modules"] == [
        "c_attn"
    ]
    model = models.load(base, dtype=torch.float32)
    attached = attach(model, arena_bytes=1 << 20)
    attached.load("tuned", tmp_path / "out")
    with attached.rows(["tuned"]):
        found = models.logits(model)
    wanted = models.logits(models.load(tuned, dtype=torch.float32))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(models.logits(model), wanted, rtol=1e-2, atol=1e-2)


def test_extracted_of_a_merge_is_the_adapter_again(files, tmp_path):
    from fader_adapters.weightspace.merge import merge
    from fader_adapters.weightspace.terms import Ingredient

    made = files("llama")
    models.peft_merge(made.base, {made.tone: 1.0}, tmp_path / "merged")
    done = extract(tmp_path / "merged", made.base, tmp_path / "out", rank=4)
    assert done.report["overall"]["relative_error"] < 1e-5
    first = merge(made.base, [Ingredient(made.tone)], tmp_path / "a", form="nf4")
    second = merge(made.base, [Ingredient(tmp_path / "out")], tmp_path / "b", form="nf4")
    one, two = (load_file(d.directory / "model.safetensors") for d in (first, second))
    differing = sum(int((one[k] != two[k]).sum()) for k in one if one[k].dtype == torch.uint8)
    assert differing <= 1e-3 * sum(t.numel() for t in one.values())


def test_peft_model_of_the_adapter_has_nothing_missing(files, tmp_path):
    base = files("llama").base
    tuned = models.rewrite(base, tmp_path / "tuned", planted())
    extract(tuned, base, tmp_path / "out", rank=3)
    model = models.load(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, tmp_path / "out")
    held = [name for name, p in peft.named_parameters() if "lora_" in name]
    assert len(held) == 4
    assert all(bool(p.any()) for name, p in peft.named_parameters() if "lora_" in name)


def test_family_with_another_width_is_refused_by_shape(files, tmp_path):
    mistral, base = write_family("mistral", tmp_path / "m"), files("llama").base
    config = json.loads((mistral / "config.json").read_text()) | {"model_type": "llama"}
    config["architectures"] = ["LlamaForCausalLM"]
    config["intermediate_size"] = 256
    (mistral / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterMismatch, match=r"gate_proj' is 128 → 256 .* 128 → 192"):
        extract(mistral, base, tmp_path / "out", rank=4)
