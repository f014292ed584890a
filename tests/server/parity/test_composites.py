"""Text through models that could also see: served with their towers, whatever those' widths."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fader_adapters.errors import AdapterMismatch
from fader_adapters.weightspace import base as weightspace
from fader_server.errors import ModelUnsupported
from fader_server.model.checkpoint import read_config
from fader_server.model.writing import quantize
from tests.server.parity.test_families import BOUND, check, difference
from tests.server.parity.test_many_families import asks, equals_peft
from tests.support.composites import COMPOSITES, ODD, write_composite
from tests.support.oracle import Oracle
from tests.support.peft_adapters import write_adapter
from tests.support.world import Ask, TinyWorld, greedy

QUICK = frozenset({"gemma3", "gemma4", "llava", "mistral3", "qwen2_5_vl"})


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in sorted(COMPOSITES)],
)
def test_mixed_batch_over_text_and_tower_linears_equals_peft(name: str, tmp_path: Path):
    source = write_composite(name, tmp_path / "base")
    world = TinyWorld(source)
    decoder = {id(module) for module in world.base.model.get_decoder().modules()}
    linears = world.base.installed.spec.linears
    inside = [item for item in linears if item.role == "linear"]
    towers = [item for item in inside if id(module_at(world, item.path)) not in decoder]
    assert any(item.in_features % 64 for item in towers)
    equals_peft(source, tmp_path, world)


def module_at(world: TinyWorld, path: str) -> torch.nn.Module:
    return world.base.model.get_submodule(path)


def test_quantised_composite_is_the_same_base(tmp_path: Path):
    source = write_composite("gemma3", tmp_path / "base")
    quantize(str(source), tmp_path / "nf4", device=torch.device("cpu"))
    questions = [ask for ask in asks(128) if not ask.blend]
    plain, ready = TinyWorld(source), TinyWorld(tmp_path / "nf4")
    assert plain.base.installed.spec.identity == ready.base.installed.spec.identity
    assert plain.run(questions) == ready.run(questions)
    opened = weightspace.open_base(source)
    odd = {item.path for item in opened.inside if item.in_features == ODD}
    assert odd
    assert not odd & opened.quantisable


def test_attention_in_both_directions_is_refused_unless_only_pictures_have_it(tmp_path: Path):
    source = write_composite("gemma4", tmp_path / "base")
    file = source / "config.json"
    assert '"vision"' in file.read_text()
    TinyWorld(source)
    file.write_text(file.read_text().replace('"vision"', '"all"'))
    with pytest.raises(ModelUnsupported, match="use_bidirectional_attention is set"):
        TinyWorld(source)


BOTH = {
    "llava": ["q_proj", "down_proj", "fc1", "linear_1"],
    "gemma3": ["q_proj", "down_proj", "fc1"],
    "qwen2_5_vl": ["q_proj", "down_proj", "qkv"],
}
"""Model type → linears of text and towers."""
OLDER = {
    "llava": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    "gemma3": {"model.vision_tower.": "model.vision_tower.vision_model."},
    "qwen2_5_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
}
"""Model type → how transformers 4 named its parts."""


@pytest.mark.parametrize("name", sorted(OLDER))
def test_adapter_of_transformers_4_means_the_same_modules(name: str, tmp_path: Path):
    base = write_composite(name, tmp_path / "base")
    world = TinyWorld(base)
    given = {
        adapter: write_adapter(base, tmp_path / adapter, rank=8, seed=i, target_modules=BOTH[name])
        for i, adapter in enumerate(("new", "other"))
    }
    given["old"] = _renamed(given["new"], tmp_path / "old", OLDER[name])
    for adapter, path in given.items():
        world.load(adapter, path)
    prompt = [17 * i % 500 for i in range(40)]
    asks = [Ask(prompt, {adapter: 1.0}, greedy(4)) for adapter in given]
    new, other, old = world.run(asks)
    assert old == new != other


def test_a_name_that_a_tower_has_split_means_the_text_decoder_as_in_peft(tmp_path: Path):
    base = write_composite("glm4v", tmp_path / "base")
    world = TinyWorld(base)
    names = ["gate_up_proj", "o_proj"]
    adapter = write_adapter(base, tmp_path / "text", rank=8, seed=1, target_modules=names)
    world.load("text", adapter)
    ask = Ask([17 * i % 500 for i in range(40)], {"text": 1.0}, greedy(4, prompt_logprobs=0))
    (answer,) = world.run([ask])
    oracle = Oracle(base, torch.float32, {"text": adapter})
    check(oracle, [ask], [answer], BOUND[torch.float32])
    assert difference(oracle, replace(ask, blend={}), answer, 1.0) > 10 * BOUND[torch.float32]


def test_older_adapter_with_a_stranger_in_its_tower_is_refused(tmp_path: Path):
    base = write_composite("llava", tmp_path / "base")
    new = write_adapter(base, tmp_path / "new", rank=8, seed=1, target_modules=BOTH["llava"])
    names = {**OLDER["llava"], "model.vision_tower.": "vision_tower.vision_model.novel."}
    with pytest.raises(AdapterMismatch, match="names no linear of the base"):
        TinyWorld(base).load("old", _renamed(new, tmp_path / "old", names))


def _renamed(adapter: Path, target: Path, names: Mapping[str, str]) -> Path:
    shutil.copytree(adapter, target)
    file, first = target / "adapter_model.safetensors", "base_model.model."
    tensors = {}
    for key, tensor in load_file(file).items():
        inner = key.removeprefix(first)
        part = next((part for part in names if inner.startswith(part)), "")
        tensors[first + names.get(part, "") + inner.removeprefix(part)] = tensor
    assert tensors.keys() != load_file(file).keys()
    save_file(tensors, file)
    return target


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("paligemma", "use_bidirectional_attention is set"),  # prompts, in both directions
        ("blip-2", "missing 1 required positional argument: 'pixel_values'"),
    ],
)
def test_model_that_cannot_answer_text_alone_is_refused_in_one_line(
    name: str, reason: str, tmp_path: Path
):
    source = write_composite(name, tmp_path / "base")
    with pytest.raises(ModelUnsupported, match=reason) as caught:
        TinyWorld(source)
    assert "\n" not in str(caught.value)


def test_a_tower_that_lacks_a_library_is_named_in_one_line(tmp_path: Path, monkeypatch):
    source = write_composite("llava", tmp_path / "base")

    def build(*_: object) -> None:
        raise ImportError("\nTimmWrapperModel requires the timm library\nand advice")

    monkeypatch.setattr("transformers.CLIPVisionModel.__init__", build)
    with pytest.raises(ModelUnsupported, match=r"requires the timm library$"):
        TinyWorld(source)


@pytest.mark.parametrize("kind", ["diffusion_gemma", "florence2", "qwen2_5_omni"])
def test_model_that_does_not_write_token_by_token_is_refused_by_its_config(
    kind: str, tmp_path: Path
):
    """Blocks at once, after an encoder, by parts that a model of its own leads."""
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ModelUnsupported, match=f"{kind} is not a decoder-only language model"):
        read_config(str(tmp_path))
    transformers.AutoConfig.for_model("llava").save_pretrained(tmp_path)
    read_config(str(tmp_path))


def test_files_of_a_processor_travel_with_a_quantised_base(tmp_path: Path):
    source = write_composite("llava", tmp_path / "base")
    for name in ("preprocessor_config.json", "chat_template.json"):
        (source / name).write_text("{}")
    quantize(str(source), tmp_path / "nf4", device=torch.device("cpu"))
    found = {file.name for file in (tmp_path / "nf4").iterdir()}
    assert {"preprocessor_config.json", "chat_template.json"} < found
    assert "processor_config.json" not in found
