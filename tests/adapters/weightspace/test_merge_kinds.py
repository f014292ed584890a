"""Merging what is more than a low-rank product: DoRA, adapted heads and embeddings; PEFT's weights
are the reference, a blend's are the weighted sum of their changes."""

import pytest
import torch
from peft import PeftModel

from fader_adapters.errors import AdapterInvalid
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


def test_what_is_no_change_of_a_checkpoints_weights_is_refused_by_name(made, tmp_path):
    base, adapters = made
    with pytest.raises(AdapterInvalid, match="lora_bias"):
        merge(base, [Ingredient(adapters["bias"])], tmp_path / "a", form="bf16")
    with pytest.raises(AdapterInvalid, match="use_dora"):
        compress([Ingredient(adapters["dora"])], tmp_path / "b", rank=8)
    table = write_adapter(base, tmp_path / "table", rank=2, seed=4, target_modules=["embed_tokens"])
    with pytest.raises(AdapterInvalid, match="adapted embedding"):
        compress([Ingredient(table)], tmp_path / "b", rank=8)
    tied = write_family("qwen3", tmp_path / "tied")
    head = write_adapter(tied, tmp_path / "head", rank=2, seed=1, target_modules=["lm_head"])
    with pytest.raises(AdapterInvalid, match="ties"):
        merge(tied, [Ingredient(head)], tmp_path / "c", form="bf16")
    assert merge(tied, [Ingredient(_inside(tied, tmp_path))], tmp_path / "d", form="bf16").shards


def _inside(base, folder):
    return write_adapter(base, folder / "inside", rank=2, seed=1, target_modules=["q_proj"])
