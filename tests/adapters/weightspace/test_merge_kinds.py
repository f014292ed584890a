"""Merging what is more than a low-rank product: DoRA, adapted heads and embeddings; PEFT's weights
are the reference, a blend's are the weighted sum of their changes."""

import itertools

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from fader_adapters.errors import AdapterInvalid, BaseUnsupported
from fader_adapters.weightspace.compress import compress
from fader_adapters.weightspace.merge import merge
from fader_adapters.weightspace.terms import Ingredient
from tests.adapters.weightspace import models
from tests.support.families import outside, write_family
from tests.support.peft_adapters import write_adapter


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    base = write_family("llama", folder / "base")
    kinds = {"use_dora": True, "target_modules": [*outside("llama"), "q_proj"]}
    return base, {
        "dora": write_adapter(base, folder / "dora", rank=4, seed=1, **kinds),
        "other": write_adapter(base, folder / "other", rank=6, seed=2, copies=True, **kinds),
        "bias": write_adapter(
            base, folder / "bias", rank=2, seed=3, lora_bias=True, target_modules=["q_proj"]
        ),
    }


def changed(base, adapter) -> dict[str, torch.Tensor]:
    """PEFT's merged weights in fp32."""
    model = models.load(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def test_a_blend_of_dora_merges_to_the_weighted_sum_of_pefts_changes(made, tmp_path):
    base, adapters = made
    weights = {"dora": 0.7, "other": -0.4}
    blend = [Ingredient(adapters[name], gamma) for name, gamma in weights.items()]
    done = merge(base, blend, tmp_path / "out", form="bf16")
    plain = models.load(base, dtype=torch.float32).state_dict()
    theirs = {name: changed(base, adapters[name]) for name in weights}
    mine = models.load(tmp_path / "out").state_dict()
    assert {"lm_head", "model.embed_tokens"} < {loss["path"] for loss in done.report["linears"]}
    for loss in done.report["linears"]:
        name = f"{loss['path']}.weight"
        wanted = plain[name] + sum(
            gamma * (theirs[which][name] - plain[name]) for which, gamma in weights.items()
        )
        torch.testing.assert_close(mine[name].float(), wanted, rtol=2**-8, atol=1e-6)
        single = plain[name] + theirs["dora"][name] - plain[name]
        assert (mine[name].float() - single).abs().max() > 10 * 2**-8 * single.abs().max() / 2


@pytest.mark.filterwarnings("ignore:.*targeted layer of type Linear has no bias")
def test_what_is_no_change_of_a_checkpoints_weights_is_refused_by_name(made, tmp_path):
    base, adapters = made
    where = {"lora_bias": True, "target_modules": ["q_proj", "down_proj"]}
    biased = write_adapter(base, tmp_path / "biased", rank=2, seed=3, **where)
    with pytest.raises(BaseUnsupported, match=r"down_proj' has no bias in the base"):
        merge(base, [Ingredient(biased)], tmp_path / "a", form="bf16")
    assert not (tmp_path / "a" / "model.safetensors").exists()
    with pytest.raises(AdapterInvalid, match="q_proj' has lora_bias"):
        compress([Ingredient(adapters["bias"])], tmp_path / "b", rank=8)
    with pytest.raises(AdapterInvalid, match="use_dora"):
        compress([Ingredient(adapters["dora"])], tmp_path / "b", rank=8)
    table = write_adapter(base, tmp_path / "table", rank=2, seed=4, target_modules=["embed_tokens"])
    with pytest.raises(AdapterInvalid, match="adapted embedding"):
        compress([Ingredient(table)], tmp_path / "b", rank=8)


@pytest.mark.parametrize("form", ["bf16", "nf4"])
@pytest.mark.parametrize(("family", "targets"), [("llama", ["q_proj", "v_proj"]),
                                                 ("gpt2", ["c_attn", "c_proj"])])  # fmt: skip
def test_what_lora_bias_adds_is_in_the_biases_of_the_base(family, targets, form, tmp_path):
    base = write_family(family, tmp_path / "base")
    blend = {}
    for seed, gamma in ((1, 0.7), (2, -0.4)):
        path = tmp_path / f"a{seed}"
        write_adapter(base, path, rank=2, seed=seed, lora_bias=True, target_modules=targets)
        blend[rescaled_biases(path, seed)] = gamma
    merge(base, [Ingredient(p, g) for p, g in blend.items()], tmp_path / "out", form=form)
    plain = models.load(base, dtype=torch.float32).state_dict()
    theirs = [changed(base, adapter) for adapter in blend]
    mine = models.load(tmp_path / "out").state_dict()
    names = [name for name in plain if name.endswith(".bias")]
    moved = 0
    for name in names:
        wanted = plain[name] + sum(
            gamma * (their[name] - plain[name])
            for gamma, their in zip(blend.values(), theirs, strict=True)
        )
        torch.testing.assert_close(mine[name].float(), wanted, rtol=2**-8, atol=1e-6)
        moved += (wanted - plain[name]).abs().max() > 0.1
    adapted = sum(any(t in name for t in targets) for name in names)
    assert 0 < moved == adapted


def rescaled_biases(adapter, seed):
    """PEFT begins with biases of 0."""
    path, generator = adapter / "adapter_model.safetensors", torch.Generator().manual_seed(seed)
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("lora_B.bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    save_file(tensors, path, metadata={"format": "pt"})
    return adapter


def untied(base) -> torch.nn.Module:
    """The base with a head of its own, as transformers would load it."""
    model = models.load(base, dtype=torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


ENDS = list(itertools.product(("head", "table", "both"), ("qwen3", "gemma2", "gpt2")))
QUICK = {("head", "qwen3"), ("table", "gemma2"), ("both", "gemma2"), ("both", "gpt2")}


@pytest.mark.parametrize("form", ["bf16", "nf4"])
@pytest.mark.parametrize(
    ("which", "family"),
    [pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow) for pair in ENDS],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")  # gpt2: Conv1D and a plain head
def test_a_tied_base_whose_ends_are_adapted_comes_out_untied(family, which, form, tmp_path):
    """gemma2 scales what its embedding gives, gpt2 has other names."""
    base = write_family(family, tmp_path / "base")
    table = "wte" if family == "gpt2" else "embed_tokens"
    ends = {"head": ["lm_head"], "table": [table], "both": ["lm_head", table]}[which]
    inside = "c_attn" if family == "gpt2" else "q_proj"
    adapter = write_adapter(
        base, tmp_path / "a", rank=4, seed=1, scale=0.2, target_modules=[*ends, inside]
    )
    merge(base, [Ingredient(adapter)], tmp_path / "out", form=form)
    theirs = PeftModel.from_pretrained(untied(base), adapter).merge_and_unload()
    mine = models.load(tmp_path / "out")
    assert mine.lm_head.weight is not mine.get_input_embeddings().weight
    plain = untied(base)
    for name, end in (("head", "lm_head"), ("table", "embeddings")):
        got, wanted, was = (
            (m.lm_head if end == "lm_head" else m.get_input_embeddings()).weight.float()
            for m in (mine, theirs, plain)
        )
        torch.testing.assert_close(got, wanted, rtol=2**-8, atol=1e-6)
        far = (wanted - was).abs().max() > 0.02
        assert far == (which in (name, "both"))
    if form == "bf16":
        torch.testing.assert_close(models.logits(mine), models.logits(theirs), rtol=0, atol=0.15)


WHOLE = {
    "both": ("qwen3", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "head": ("gemma2", {"modules_to_save": ["lm_head"], "rows": range(0, 90, 3)}),
    "table": ("gemma2", {"modules_to_save": ["embed_tokens"], "rows": range(0, 90, 3)}),
    "untied": ("llama", {"modules_to_save": ["lm_head", "embed_tokens"], "rows": [3, 5]}),
}


@pytest.mark.parametrize("form", ["bf16", "nf4"])
@pytest.mark.parametrize("kind", WHOLE)
def test_what_was_trained_whole_is_in_the_checkpoint(kind, form, tmp_path):
    family, trained = WHOLE[kind]
    base = write_family(family, tmp_path / "base")
    adapter = write_adapter(
        base, tmp_path / "a", rank=4, seed=1, target_modules=["q_proj"], **trained
    )
    merge(base, [Ingredient(adapter)], tmp_path / "out", form=form)
    plain = models.load(base, dtype=torch.float32) if kind == "untied" else untied(base)
    was = [plain.lm_head.weight.clone(), plain.get_input_embeddings().weight.clone()]
    theirs = PeftModel.from_pretrained(plain, adapter).merge_and_unload()
    mine = models.load(tmp_path / "out")
    moved = 0
    for before, (got, wanted) in zip(
        was,
        ((m.weight, t.weight) for m, t in zip(_ends(mine), _ends(theirs), strict=True)),
        strict=True,
    ):
        torch.testing.assert_close(got.float(), wanted, rtol=2**-8, atol=1e-6)
        moved += bool((wanted - before).abs().max() > 0.02)
    assert moved == len(trained["modules_to_save"])
    if form == "bf16":
        torch.testing.assert_close(models.logits(mine), models.logits(theirs), rtol=0, atol=0.15)
    with pytest.raises(AdapterInvalid, match="modules_to_save replaces whole weights"):
        compress([Ingredient(adapter)], tmp_path / "low", rank=8)


def _ends(model) -> tuple[torch.nn.Module, torch.nn.Module]:
    return model.lm_head, model.get_input_embeddings()


def test_a_tied_base_stays_tied_when_its_ends_are_left_alone(tmp_path):
    tied = write_family("qwen3", tmp_path / "tied")
    inside = write_adapter(tied, tmp_path / "a", rank=2, seed=1, target_modules=["q_proj"])
    merge(tied, [Ingredient(inside)], tmp_path / "out", form="bf16")
    mine = models.load(tmp_path / "out")
    assert mine.lm_head.weight is mine.get_input_embeddings().weight
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
