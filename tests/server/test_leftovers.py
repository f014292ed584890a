"""What a checkpoint holds beside the weights its model reads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fader_server.errors import ModelUnsupported
from fader_server.model import checkpoint
from fader_server.model.checkpoint import read_config, read_nf4
from fader_server.model.writing import quantize
from tests.support.composites import write_composite
from tests.support.families import write_family
from tests.support.many_families import MANY, write_many

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]
QUANTISED = "quantised|a quantisation that its config does not name"
LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family("llama", tmp_path_factory.mktemp("leftovers") / "llama")


def _read(source: Path) -> None:
    read_nf4(str(source), read_config(str(source)), device=CPU, attn_implementation=None)


def _with(source: Path, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return target


def _codes(dtype: torch.dtype, scale: str | None = ".weight_scale") -> Callable[..., Tensors]:
    """Every linear of the layers in codes, with a scale beside each."""

    def change(tensors: Tensors) -> Tensors:
        made = {}
        top = 448 if dtype.is_floating_point else 127
        for key, value in tensors.items():
            if not key.endswith("proj.weight"):
                made[key] = value
                continue
            step = value.abs().max() / top
            made[key] = (value / step).to(dtype)
            if scale is not None:
                made[key.removesuffix(".weight") + scale] = step
        return made

    return change


def _beside(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.full((4,), 0.5) for name in names}


def _says(file: str, facts: dict[str, Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        before = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps(before | facts))

    return write


@pytest.mark.parametrize(
    "change",
    [
        _codes(torch.float8_e4m3fn),
        _codes(torch.float8_e4m3fn, None),
        _codes(torch.int8, ".scales"),
        _codes(torch.uint8, ".SCB"),
        *(_beside(f"{LAYER}.mlp.up_proj.{name}") for name in (
            "weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale", "scales", "scale",
            "qweight", "qzeros", "weight_packed", "weight_zero_point", "weight_quantizer._amax",
        )),
        _beside("lm_head.weight_scale"),
        _beside(f"{LAYER}.mlp.experts.3.down_proj.weight_scale"),
    ],
)  # fmt: skip
def test_codes_of_a_method_that_nobody_named_are_refused(llama, tmp_path, change):
    """Read as numbers they gave an answer, and `fader quantize` wrote it down."""
    strange = _with(llama, tmp_path / "base", change)
    with pytest.raises(ModelUnsupported, match=QUANTISED) as caught:
        _read(strange)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelUnsupported, match=QUANTISED):
        quantize(str(strange), tmp_path / "written", device=CPU)
    assert not (tmp_path / "written").exists()


MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A16_AWQ"}}


@pytest.mark.parametrize(
    ("file", "facts", "told"),
    [
        ("hf_quant_config.json", MODELOPT, r"W4A16_AWQ \(as hf_quant_config.json tells\)"),
        (
            "config.json",
            {"compression_config": {"config_groups": {}}},
            r"compressed-tensors \(as compression_config tells\)",
        ),
    ],
)
def test_methods_are_read_where_exports_name_them(llama, tmp_path, file, facts, told):
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    _says(file, facts)(base)
    with pytest.raises(ModelUnsupported, match=f"quantised with {told}"):
        read_config(str(base))


def test_the_method_of_a_text_config_is_read(tmp_path):
    base = write_composite("llava", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["quantization_config"] = {"quant_method": "fp8"}
    read_config(str(base))
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelUnsupported, match=r"quantised with fp8 \(as its text_config tells\)"):
        read_config(str(base))


def _masks(tensors: Tensors) -> Tensors:
    mask = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    return tensors | {
        f"{LAYER}.self_attn.bias": mask,
        f"{LAYER}.self_attn.mask": mask[0, 0].clone(),
    }


@pytest.mark.parametrize(
    "change",
    [
        _masks,
        _beside(f"{LAYER}.self_attn.k_proj.k_scale", f"{LAYER}.self_attn.v_scale"),
        _beside(f"{LAYER}.self_attn.k_proj.output_scale"),
        _beside("logit_scale", "model.norm.scale", "tower.blocks.0.scale"),
    ],
)
def test_plain_weights_are_read_whatever_lies_beside_them(llama, tmp_path, change):
    """Scales of a cache in eight bits, masks, and what a head of another kind would read."""
    _read(_with(llama, tmp_path / "base", change))


def test_a_cache_alone_may_be_quantised(llama, tmp_path):
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    cache = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
    _says("hf_quant_config.json", {"quantization": cache})(base)
    _read(base)


def test_a_base_of_the_hub_is_looked_at_once_it_is_here(llama, tmp_path, monkeypatch):
    strange = _with(llama, tmp_path / "base", _codes(torch.int8, None))
    asked: list[str] = []

    def cached(source: str, name: str) -> str:
        asked.append(source)
        return str(strange / name)

    config = read_config(str(strange))
    monkeypatch.setattr(checkpoint, "try_to_load_from_cache", cached)
    with pytest.raises(ModelUnsupported, match=r"down_proj\.weight is int8"):
        read_nf4("some/model", config, device=CPU, attn_implementation=None)
    assert asked == ["some/model"]


def _told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    "names",
    [
        (f"{LAYER}.mlp.up_proj.bias",),
        (f"{LAYER}.self_attn.q_norm.weight", "model.layers.1.self_attn.q_norm.weight"),
        (f"{LAYER}.cross.0.inner.proj.weight",),
        ("layers.0.mlp.up_proj.bias",),  # as the base model alone is saved
        ("model.norm.bias", "model.embed_norm.weight", "model.gain", "score.weight"),
        ("model.layers.2.mlp.up_proj.weight",),  # the config tells of two
        (f"{LAYER}.self_attn.k_scale",),
    ],
)
def test_tensors_that_the_model_has_no_place_for_are_told(llama, tmp_path, caplog, names):
    _read(_with(llama, tmp_path / "base", _beside(*names)))
    (line,) = _told(caplog)
    assert f"{len(names)} tensors" in line
    assert "no place in LlamaForCausalLM" in line
    for name in sorted(names)[:3]:
        assert name in line
    assert line.endswith("…") == (len(names) > 3)


@pytest.mark.parametrize(
    "names",
    [
        (f"{LAYER}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.cos_cached"),
        (f"{LAYER}.attn.bias", f"{LAYER}.attn.masked_bias", "h.0.attn.attention.bias"),
        ("model.embed_positions.weights", "model.position_ids"),
        ("model.layers.2.eh_proj.weight", "model.layers.2.mlp.up_proj.weight"),
        ("mtp.norm.weight", "mtp.layers.0.mlp.up_proj.weight", "mtp.fc.weight"),
        ("model.visual.patch.proj.weight", "model.visual.pos"),
        ("v_head.summary.weight",),
    ],
)
def test_what_models_make_themselves_or_leave_out_as_a_whole_is_not_told(
    llama, tmp_path, caplog, names
):
    _read(_with(llama, tmp_path / "base", _beside(*names)))
    assert _told(caplog) == []


def test_what_a_class_ignores_by_itself_is_not_told(tmp_path, caplog):
    name, changes = MANY["gpt-neox"]
    base = write_many(name, changes, tmp_path / "plain")
    _read(
        _with(
            base,
            tmp_path / "base",
            _beside("gpt_neox.layers.0.attention.bias_of_old", "gpt_neox.layers.0.thing"),
        )
    )
    (line,) = _told(caplog)
    assert line.endswith("left out: gpt_neox.layers.0.thing")
