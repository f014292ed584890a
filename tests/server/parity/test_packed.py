"""Adapters trained on split projections over a packed base, and the other way, against PEFT."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fader_adapters.errors import AdapterMismatch
from fader_adapters.source import CONFIG_FILE, WEIGHTS_FILE
from tests.server.parity.test_families import BOUND, check, difference
from tests.server.parity.test_kinds import asks, world
from tests.support.families import write_family
from tests.support.many_families import write_many
from tests.support.oracle import Oracle, nf4_oracle
from tests.support.packing import as_packed, as_split, write_pair
from tests.support.peft_adapters import write_adapter
from tests.support.solo_families import SOLO
from tests.support.world import Ask, TinyWorld

BLENDS = [{}, {"plain": 1.0}, {"dora": 1.0}, {"some": 1.0}, {"plain": 0.5, "some": -1.5}]


@pytest.fixture(scope="module", params=["split adapters, packed base", "the other way"])
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    packed, split = write_pair(folder)
    turned = request.param == "the other way"
    base, trained = (split, packed) if turned else (packed, split)
    some = ["qkv_proj", "down_proj"] if turned else ["q_proj", "v_proj", "up_proj"]
    adapters = {
        "plain": write_adapter(trained, folder / "plain", rank=4, seed=1),
        "dora": write_adapter(trained, folder / "dora", rank=6, seed=2, use_dora=True),
        "some": write_adapter(
            trained,
            folder / "some",
            rank=8,
            seed=3,
            target_modules=some,
            alpha_pattern={some[1]: 5},
        ),
    }
    same = (as_packed if turned else as_split)(nf4_oracle(base, torch.float32))
    return base, adapters, Oracle(same, torch.float32, adapters)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_mixed_batch_equals_peft_on_the_adapters_own_architecture(case, backend):
    base, adapters, oracle = case
    mixed = asks(BLENDS, count=10)
    answers = world(base, adapters, torch.float32, backend).run(mixed)
    check(oracle, mixed, answers, BOUND[torch.float32])
    other = Ask(mixed[4].prompt, {"plain": 0.5, "some": -1.4}, mixed[4].params)
    assert difference(oracle, other, answers[4], 10.0) > 10 * BOUND[torch.float32]


def test_queries_keys_and_values_of_a_delta_rule_may_be_apart(tmp_path):
    """As Tinker trains them; PEFT has the same delta in one piece: ranks side by side."""
    base = write_many(*SOLO["qwen3.5"], tmp_path / "base")
    whole = write_adapter(
        base, tmp_path / "whole", rank=12, seed=1, target_modules=["in_proj_qkv"], lora_alpha=24
    )
    one, apart, widths = {}, {}, {"q": 64, "k": 64, "v": 128}
    for key, a in load_file(whole / WEIGHTS_FILE).items():
        if ".lora_A." not in key:
            continue
        other = key.replace("lora_A", "lora_B")
        factors = [torch.randn(width, 4) * 0.02 for width in widths.values()]
        one |= {key: a, other: torch.block_diag(*factors)}
        for name, rows, b in zip(widths, a.split(4), factors, strict=True):
            for of, factor in ((key, rows), (other, b)):
                apart[of.replace("in_proj_qkv", f"in_proj_{name}")] = factor.contiguous()
    save_file(one, whole / WEIGHTS_FILE)
    split = tmp_path / "split"
    split.mkdir()
    config = json.loads((whole / CONFIG_FILE).read_text())
    config |= {"r": 4, "lora_alpha": 8, "target_modules": [f"in_proj_{name}" for name in widths]}
    (split / CONFIG_FILE).write_text(json.dumps(config))
    save_file(apart, split / WEIGHTS_FILE)
    oracle = Oracle(base, torch.float32, {"plain": whole})
    mixed = asks([{}, {"plain": 1.0}, {"plain": -0.5}], count=6)
    answers = world(base, {"plain": split}, torch.float32, "auto").run(mixed)
    check(oracle, mixed, answers, BOUND[torch.float32])
    other = Ask(mixed[1].prompt, {"plain": 0.9}, mixed[1].params)
    assert difference(oracle, other, answers[1], 10.0) > 10 * BOUND[torch.float32]


def test_an_adapter_of_projections_that_the_base_has_in_neither_form_is_a_mismatch(case, tmp_path):
    _, adapters, _ = case
    gpt2 = TinyWorld(write_family("gpt2", tmp_path / "gpt2"))
    with pytest.raises(AdapterMismatch, match="another base"):
        gpt2.load("plain", adapters["plain"])
