"""NF4 checkpoints of other tools: a head in NF4, towers that are plain whatever the config says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BitsAndBytesConfig

from fader_adapters.architecture import auto_class
from fader_server.errors import ModelUnsupported
from tests.server.parity.test_families import difference
from tests.server.parity.test_many_families import asks
from tests.support.composites import ODD, write_composite
from tests.support.families import CONFIGS, write_family
from tests.support.oracle import Oracle, ready_oracle
from tests.support.peft_adapters import write_adapter
from tests.support.world import Ask, TinyWorld, greedy

LONG = [3 + i % 400 for i in range(300)]
"""More tokens than a chunk has."""


def nf4_by_transformers(source: Path, target: Path, skip: list[str]) -> Path:
    """A checkpoint that bitsandbytes quantises but for `skip`."""
    kind = auto_class(AutoConfig.from_pretrained(source))
    wanted = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=skip,
    )
    model = kind.from_pretrained(source, device_map={"": "cpu"}, quantization_config=wanted)
    model.save_pretrained(target)
    return target


def say_skipped(folder: Path, skip: list[str]) -> None:
    """Let the checkpoint's config name these as left alone."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = skip
    (folder / "config.json").write_text(json.dumps(config))


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_head_in_nf4_answers_and_takes_adapters_as_in_transformers(name: str, tmp_path: Path):
    source = write_family(name, tmp_path / "source")
    base = nf4_by_transformers(source, tmp_path / "base", ["none"])
    tied = bool(CONFIGS[name]().tie_word_embeddings)
    kind = auto_class(AutoConfig.from_pretrained(base)).from_pretrained(base)
    assert isinstance(kind.get_output_embeddings(), Linear4bit)
    world = TinyWorld(base)
    head = write_adapter(source, tmp_path / "head", rank=8, seed=1, target_modules=["lm_head"])
    oracle = Oracle(ready_oracle(base, torch.float32), torch.float32, {"head": head})
    world.load("head", head)
    params = greedy(4, prompt_logprobs=0)
    questions = [Ask(LONG, params=params), Ask(LONG, {"head": 1.0}, params)]
    for ask, answer in zip(questions, world.run(questions), strict=True):
        assert answer.error is None
        assert difference(oracle, ask, answer, 1e-4) < 1e-4
    assert difference(oracle, replace(questions[1], blend={}), answer, 1e9) > 1e-3
    spec = world.base.installed.spec
    assert spec.tied == tied


def test_a_tower_that_is_plain_in_the_file_needs_no_mention_in_its_config(tmp_path: Path):
    """transformers 4 left alone what had a name of the list anywhere in its path."""
    source = write_composite("gemma3", tmp_path / "source")
    skip = ["lm_head", "vision_tower", "multi_modal_projector"]
    base = nf4_by_transformers(source, tmp_path / "base", [f".*{name}.*" for name in skip])
    say_skipped(base, skip)
    questions = [replace(ask, blend={}) for ask in asks(512)[:3]]
    named = TinyWorld(base)
    say_skipped(base, ["lm_head"])
    silent = TinyWorld(base)
    assert silent.base.installed.spec == named.base.installed.spec
    answers = silent.run(questions)
    assert answers == named.run(questions)
    oracle = Oracle(ready_oracle(base, torch.float32), torch.float32, {})
    for ask, answer in zip(questions, answers, strict=True):
        assert difference(oracle, ask, answer, 1e-4) < 1e-4


def test_a_tower_in_nf4_whose_rows_are_no_whole_blocks_is_decoded(tmp_path: Path):
    source = write_composite("gemma3", tmp_path / "source")
    base = nf4_by_transformers(source, tmp_path / "base", ["lm_head"])
    world = TinyWorld(base)
    theirs = ready_oracle(base, torch.float32)
    odd = [
        (site, world.base.installed.spec.linears[site.spec.linears[0]])
        for site in world.base.installed.sites
        if site.spec.in_features == ODD
    ]
    assert odd
    for site, spec in odd:
        own = theirs.get_submodule(spec.path).weight
        assert torch.equal(site.kernel.base.dense(torch.float32), own)
    ask = Ask([5, 6, 7, 8], params=greedy(4, prompt_logprobs=0))
    (answer,) = world.run([ask])
    assert difference(Oracle(theirs, torch.float32, {}), ask, answer, 1e-4) < 1e-4


def test_a_config_that_calls_plain_weights_nf4_is_refused(tmp_path: Path):
    base = write_family("llama", tmp_path / "base")
    file = base / "config.json"
    claim = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": claim}))
    with pytest.raises(ModelUnsupported, match="its files hold plain weights; remove"):
        TinyWorld(base)


def test_packed_bytes_without_their_state_are_refused(tmp_path: Path):
    source = write_family("llama", tmp_path / "source")
    base = nf4_by_transformers(source, tmp_path / "base", ["lm_head"])
    lost = "layers.1.mlp.down_proj.weight."
    edit(base, lambda tensors: {k: v for k, v in tensors.items() if lost not in k})
    with pytest.raises(ModelUnsupported, match=r"layers\.1\.mlp\.down_proj"):
        TinyWorld(base)
