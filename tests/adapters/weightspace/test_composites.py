"""Models that also see, merged and read by their keys, as new files or old ones name them."""

from pathlib import Path

import pytest
import torch

from fader_adapters.weightspace.base import open_base
from fader_adapters.weightspace.extract import extract
from fader_adapters.weightspace.merge import merge
from fader_adapters.weightspace.terms import Ingredient
from tests.adapters.weightspace import models
from tests.support.composites import write_composite
from tests.support.peft_adapters import write_adapter

NAMES = ["llava", "qwen2_5_vl"]
NEWER = {
    "llava": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.vision_model.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "qwen2_5_vl": {"model.": "model.language_model.", "visual.": "model.visual."},
}
"""Model type → what transformers writes into files, as it did in version 4, and its own names."""


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def base(name: str, tmp_path: Path) -> Path:
    return write_composite(name, tmp_path / "base")


def test_merge_and_extract_of_a_model_that_also_sees(base: Path, tmp_path: Path):
    tone = write_adapter(base, tmp_path / "tone", rank=8, seed=1, scale=0.2)
    merge(base, [Ingredient(tone)], tmp_path / "out", form="bf16")
    wanted = models.adapted(base, tone)
    found = models.logits(models.load(tmp_path / "out", dtype=torch.float32))
    plain = models.logits(models.load(base, dtype=torch.float32))
    assert (found - wanted).abs().max() < 0.1 * (plain - wanted).abs().max()


def test_extract_finds_what_changed_in_a_model_that_also_sees(base: Path, tmp_path: Path):
    tone = write_adapter(base, tmp_path / "tone", rank=4, seed=1, scale=0.2)
    tuned = models.peft_merge(base, {tone: 1.0}, tmp_path / "tuned")
    extract(tmp_path / "tuned", base, tmp_path / "found", rank=4)
    wanted = models.logits(tuned)
    plain = models.logits(models.load(base, dtype=torch.float32))
    found = models.adapted(base, tmp_path / "found")
    assert (found - wanted).abs().max() < 0.01 * (plain - wanted).abs().max()


def test_merge_finds_tensors_by_names_of_today(name: str, base: Path, tmp_path: Path):
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            part = next((part for part in NEWER[name] if key.startswith(part)), "")
            inner = key.removeprefix(part)
            tensors[NEWER[name].get(part, "") + inner] = tensors.pop(key)

    new = models.rewrite(base, tmp_path / "new", rename)
    assert open_base(new).names.keys() == open_base(base).names.keys()
    assert open_base(new).names != open_base(base).names
    tone = write_adapter(base, tmp_path / "tone", rank=8, seed=1, scale=0.2)
    for source in (new, base):
        merge(source, [Ingredient(tone)], tmp_path / f"{source.name}-out", form="bf16")
    found, usual = (models.logits(models.load(tmp_path / f"{n}-out")) for n in ("new", "base"))
    assert torch.equal(found, usual)
    assert not torch.equal(found, models.logits(models.load(base, dtype=torch.bfloat16)))
