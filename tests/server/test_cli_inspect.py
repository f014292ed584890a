"""`fader inspect` and `fader verify` over the demo: what they say, and that they can say no."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fader_adapters.source import CONFIG_FILE, WEIGHTS_FILE
from fader_server import demo, verification
from fader_server.cli import main
from fader_server.errors import ConfigInvalid
from fader_server.peft_side import PeftSide
from tests.adapters.mlx_files import make_mlx_config, mlx_files, write_mlx
from tests.support.families import write_family
from tests.support.many_families import MANY, write_many
from tests.support.peft_adapters import train_copies, write_adapter

SHOUT = demo.adapter_dirs()["shout"]
BASE = demo.base_dir()


def changed(tmp_path, change) -> str:
    """A copy of an adapter whose tensors were changed."""
    copy = tmp_path / "changed"
    shutil.copytree(SHOUT, copy)
    tensors = load_file(copy / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, copy / WEIGHTS_FILE)
    return str(copy)


def inspect(capsys, *arguments: object) -> dict:
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_against_its_base_an_adapter_is_told_in_full(capsys):
    told = inspect(capsys, SHOUT, "--base", BASE)
    assert (told["modules"], told["total_modules"]) == (28, 30)  # not the head, not the embedding
    assert told["kinds"] == ["lora"]
    assert told["base_match"]["verdict"] == "other"
    assert len(told["base_match"]["fingerprint"]) == 64
    assert 0 < told["relative_norm"] < told["largest_relative_norm"]
    assert set(told["sites"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert sum(site["modules"] for site in told["sites"].values()) == 28
    assert told["bytes"] > 0
    assert main(["inspect", "shout", "--adapter-dir", str(SHOUT.parent), "--base", str(BASE)]) == 0
    table = capsys.readouterr().out
    assert f"28 of {told['total_modules']}" in table
    assert told["base_match"]["fingerprint"][:40] in table


def test_alone_it_is_told_without_ratios(capsys):
    told = inspect(capsys, SHOUT)
    against = inspect(capsys, SHOUT, "--base", BASE)
    assert told["version"] == against["version"]
    assert told["delta_norm"] == against["delta_norm"]
    for absent in ("base_match", "relative_norm", "total_modules", "largest_relative_norm"):
        assert told[absent] is None


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_copies_of_the_base_are_compared_with_it_or_named(target, tmp_path, capsys):
    base, other = write_family("llama", tmp_path / "base"), tmp_path / "other"
    folder = write_adapter(
        base, tmp_path / "a", rank=4, seed=1, copies=True, target_modules=["q_proj", target]
    )
    told = inspect(capsys, folder)
    (name,) = told["copies_not_compared"]
    assert name.endswith(f"{target}.base_layer.weight")
    assert told["modules"] == inspect(capsys, folder, "--base", base)["modules"]
    assert main(["inspect", str(folder)]) == 0
    assert "not compared" in capsys.readouterr().out
    assert main(["inspect", str(folder), "--base", str(base)]) == 0
    assert "not compared" not in capsys.readouterr().out
    assert inspect(capsys, SHOUT)["copies_not_compared"] == []

    tensors = load_file(folder / WEIGHTS_FILE)
    shutil.copytree(folder, other)
    save_file({**tensors, name: tensors[name] + 1}, other / WEIGHTS_FILE)
    assert inspect(capsys, other)["copies_not_compared"] == [name]
    moved, alike = (inspect(capsys, path, "--base", base) for path in (other, folder))
    assert (moved["copies_of_base"], alike["copies_of_base"]) == ([], [name])
    assert moved["sites"][target]["delta_norm"] > 10 * alike["sites"][target]["delta_norm"]
    assert main(["inspect", str(folder), "--base", str(base)]) == 0
    assert "not trained" in capsys.readouterr().out
    save_file({**tensors, name: tensors[name][:, :-1].clone()}, other / WEIGHTS_FILE)
    assert main(["inspect", str(other)]) == 2, "what can be checked without a base is"
    assert "has shape" in capsys.readouterr().err


def silence(tensors):
    for name, tensor in tensors.items():
        tensors[name] = tensor * ("lora_A" in name)


def transpose(tensors):
    name = next(name for name in tensors if "down_proj.lora_A" in name)
    tensors[name] = tensors[name].T.contiguous()


def poison(tensors):
    next(iter(tensors.values()))[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "told"), [(silence, "zero"), (transpose, "rank"), (poison, "NaN")]
)
def test_what_a_server_refuses_is_refused_here(change, told, tmp_path, capsys):
    for extra in ([], ["--base", str(BASE)]):
        folder = changed(tmp_path / str(len(extra)), change)
        assert main(["inspect", folder, *extra]) == 2
        assert told in capsys.readouterr().err


def test_fader_is_peft_up_to_rounding(capsys):
    folders = [str(SHOUT), str(demo.adapter_dirs()["german"])]
    assert main(["verify", *folders, "--base", str(BASE), "--tokens", "8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"]
    assert [row["adapter"] for row in told["findings"]] == [None, *folders]
    for row in told["findings"]:
        assert row["difference"] <= told["threshold"] < 1e-2
        assert row["same_tokens"] == row["tokens"] == 4 * 8
        assert row["adapter"] is None or row["effect"] > 1.0


def test_an_adapter_that_differs_by_a_twentieth_of_one_tensor_is_noticed(
    tmp_path, capsys, monkeypatch
):
    def stretch(tensors):
        name = next(name for name in tensors if "layers.1" in name and "o_proj.lora_B" in name)
        tensors[name] *= 1.05

    other = changed(tmp_path, stretch)

    def theirs(source, dtype, adapters):
        return PeftSide(source, dtype, dict.fromkeys(adapters, other))

    monkeypatch.setattr(verification, "PeftSide", theirs)
    prompt = ["--prompt", "What colour is the sky?"]
    assert main(["verify", str(SHOUT), "--base", str(BASE), "--tokens", "8", *prompt]) == 1
    told = capsys.readouterr().out
    assert "NOT equal to PEFT" in told
    assert "DIFFERS" in told


def test_without_peft_one_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["verify", str(SHOUT), "--base", str(BASE)]) == 2
    assert "fader[verify]" in capsys.readouterr().err


def test_an_adapter_given_twice_is_refused(capsys):
    assert main(["verify", str(SHOUT), f"{SHOUT}/", "--base", str(BASE)]) == 2
    assert "twice" in capsys.readouterr().err


APART = {
    "experts": (
        lambda folder: write_many(*MANY["mixtral"], folder),
        {
            name: {"target_modules": ["q_proj"], "target_parameters": [f"experts.{name}"]}
            for name in ("gate_up_proj", "down_proj")
        },
    ),
    "tables": (
        lambda folder: write_family("gemma3", folder),
        {
            "both": {"target_modules": ["embed_tokens", "lm_head"]},
            "tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
            "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 6]},
        },
    ),
}
"""Adapters that PEFT refuses to hold in one model, or gets wrong there without a word."""


@pytest.mark.parametrize("kind", APART)
def test_adapters_that_peft_does_not_hold_together_are_compared_one_by_one(kind, tmp_path):
    write, kinds = APART[kind]
    base = write(tmp_path / "base")
    folders = {
        name: write_adapter(base, tmp_path / name, rank=4, seed=1, **config)
        for name, config in kinds.items()
    }
    tokens = [5, 6, 3]
    together = PeftSide(str(base), torch.float32, folders)
    before = together.logits(tokens, None)
    for name, folder in folders.items():
        found = together.logits(tokens, name)
        alone = PeftSide(str(base), torch.float32, {name: folder})
        assert torch.equal(found, alone.logits(tokens, name))
        assert not torch.equal(found, before)
    assert torch.equal(before, together.logits(tokens, None))


def test_fader_is_peft_where_modules_were_trained_whole(tmp_path, capsys):
    kinds = {"copied": {"copies": True}, "both": {"modules_to_save": ["lm_head", "embed_tokens"]}}
    folders = [
        write_adapter(BASE, tmp_path / name, rank=4, seed=5, **config)
        for name, config in kinds.items()
    ]
    train_copies(folders[0], slice(None))
    flags = ["--base", str(BASE), "--tokens", "4", "--prompt", "What colour is the sky?"]
    assert main(["verify", *map(str, folders), *flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert all(row["effect"] > 0.5 for row in told["findings"][1:])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_whole_modules_and_trained_copies_are_told_and_leave_pefts_base_alone(
    family, tmp_path, capsys
):
    base = write_family(family, tmp_path / "base")
    both = {"modules_to_save": ["lm_head", "embed_tokens"]}
    kinds = {"copied": {"copies": True}, "both": both, "plain": {}}
    folders = {
        name: write_adapter(base, tmp_path / name, rank=4, seed=seed, **config)
        for seed, (name, config) in enumerate(kinds.items())
    }
    train_copies(folders["copied"], slice(None))
    side = PeftSide(str(base), torch.float32, folders)
    tokens = [5, 6, 3]
    before = side.logits(tokens, None)
    found = {name: side.logits(tokens, name) for name in folders}
    assert torch.equal(before, side.logits(tokens, None)), "a copy was written over the base"
    assert all((one - before).abs().max() > 0.1 for one in found.values())
    for name in ("copied", "both"):
        told = inspect(capsys, folders[name], "--base", base)
        assert {"lm_head", "embed_tokens"} <= told["sites"].keys()
        assert ("modules_to_save" in told["kinds"]) == (name == "both")
        assert main(["inspect", str(folders[name])]) == 2
        assert "name the base" in capsys.readouterr().err


def test_an_adapter_that_peft_refuses_is_named_in_one_line(tmp_path):
    base = write_family("llama", tmp_path / "base")
    folder = write_adapter(base, tmp_path / "a", rank=4, seed=1)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"NOT_THERE"'))
    side = PeftSide(str(base), torch.float32, {"a": folder})
    with pytest.raises(ConfigInvalid, match=f"^PEFT cannot load {folder}: "):
        side.logits([5, 6], "a")


def test_an_adapter_of_mlx_is_verified_as_what_peft_makes_of_it(tmp_path, capsys):
    config = json.loads((SHOUT / CONFIG_FILE).read_bytes())
    tensors = {
        name.removeprefix("base_model.model.")
        .replace("lora_A.weight", "lora_a")
        .replace("lora_B.weight", "lora_b"): tensor.t().contiguous()
        for name, tensor in load_file(SHOUT / WEIGHTS_FILE).items()
    }
    scale = {"rank": config["r"], "scale": config["lora_alpha"] / config["r"]}
    run = make_mlx_config(lora_parameters=scale, num_layers=-1)
    folder = write_mlx(tmp_path / "shout", mlx_files(run, tensors))
    prompt = ["--prompt", "What colour is the sky?", "--tokens", "4"]
    assert main(["verify", str(folder), "--base", str(BASE), *prompt, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"][1]
    assert found["effect"] > 1  # PEFT heard of it, too
