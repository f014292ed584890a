"""Text through models that could also see: served with their towers, whatever those' widths."""

from pathlib import Path

import pytest
import torch

from fader_adapters.weightspace import base as weightspace
from fader_server.errors import ModelUnsupported
from fader_server.model import checkpoint
from fader_server.model.checkpoint import quantize, read_config
from tests.server.parity.test_many_families import asks, equals_peft
from tests.support.composites import COMPOSITES, ODD, write_composite
from tests.support.world import TinyWorld

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
    towers = [item for item in linears if id(module_at(world, item.path)) not in decoder]
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


def test_odd_width_that_is_to_be_quantised_is_refused(tmp_path: Path, monkeypatch):
    source = write_composite("gemma3", tmp_path / "base")
    monkeypatch.setattr(checkpoint, "_kept_plain", lambda config: None)
    with pytest.raises(ModelUnsupported, match=f"vision_tower.*width {ODD} is not a multiple"):
        TinyWorld(source)


def test_attention_in_both_directions_is_refused_unless_only_pictures_have_it(tmp_path: Path):
    source = write_composite("gemma4", tmp_path / "base")
    file = source / "config.json"
    assert '"vision"' in file.read_text()
    read_config(str(source))
    file.write_text(file.read_text().replace('"vision"', '"all"'))
    with pytest.raises(ModelUnsupported, match="use_bidirectional_attention"):
        read_config(str(source))
