"""Bases published in the codes of another method: quantised to NF4 as their weights would be."""

import hashlib
import json
import logging
import re
import weakref
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from huggingface_hub.utils import filter_repo_objects

from fader_adapters.kernels.backend import choose
from fader_adapters.weightspace.coded import Decoded
from fader_server.cli import main
from fader_server.errors import ModelUnsupported
from fader_server.model import checkpoint, quantizer
from fader_server.model.checkpoint import read_config, read_nf4
from fader_server.model.loader import load_base
from fader_server.model.writing import quantize
from tests.adapters.weightspace.models import configure
from tests.adapters.weightspace.test_coded import published
from tests.support.peft_adapters import write_adapter
from tests.support.published import change

CPU = torch.device("cpu")
QUICK = ["mxfp4", "fp8-ragged", "int4-group"]
SLOW = ["fp8-blocks", "fp8-tensor", "float-channel", "int8-channel", "autofp8", "gptq", "awq"]
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def _files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def _read(source: Path, **options: bool) -> None:
    read_nf4(str(source), read_config(str(source)), device=CPU, attn_implementation=None, **options)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_quantised_they_are_the_files_that_their_weights_are(name, experts, tmp_path):
    coded, plain = published(name, tmp_path)
    for base in (coded, plain):
        (base / "generation_config.json").write_text(json.dumps({"temperature": 0.25}))
        quantize(str(base), tmp_path / f"{base.name}-nf4", device=CPU, experts=experts)
    mine, theirs = (_files(tmp_path / f"{base.name}-nf4") for base in (coded, plain))
    assert mine == theirs
    told = json.loads((tmp_path / "coded-nf4" / "generation_config.json").read_text())
    assert told["temperature"] == 0.25
    change(coded, lambda tensors: {k: _one_more(k, v) for k, v in tensors.items()})
    quantize(str(coded), tmp_path / "other", device=CPU, experts=experts)
    other = _files(tmp_path / "other")
    assert {file for file in other if other[file] != theirs[file]} == {"model.safetensors"}


def _one_more(key: str, value: torch.Tensor) -> torch.Tensor:
    """Another scale for one block of one weight."""
    if "layers.1" in key and key.endswith(("down_proj_scales", "o_proj.weight_scale_inv")):
        value.view(-1)[0] += 1
    if "layers.1" in key and key.endswith(("o_proj.weight_scale", "o_proj.scales")):
        value.view(-1)[0] *= 2
    return value


def test_the_identity_of_a_base_is_that_of_its_weights(tmp_path):
    coded, plain = published("fp8-blocks", tmp_path, torch.float32)

    def digest(source: Path) -> str:
        backend = choose(CPU, torch.float32, "reference")
        loaded = load_base(str(source), dtype=torch.float32, device=CPU, backend=backend)
        return loaded.installed.spec.weights

    of_coded = digest(coded)
    assert of_coded == digest(plain)
    change(coded, lambda tensors: {k: _one_more(k, v) for k, v in tensors.items()})
    assert digest(coded) != of_coded


@pytest.mark.parametrize("name", ["fp8-ragged", "int4-zeros"])
def test_one_weight_is_in_memory_at_a_time(name, tmp_path, monkeypatch):
    coded, _ = published(name, tmp_path)
    seen: list[weakref.ref] = []
    alive: list[int] = []
    read, make = Decoded.read, quantizer.quantise

    def noted(self: Decoded, key: str) -> torch.Tensor:
        value = read(self, key)
        seen.append(weakref.ref(value))
        return value

    def counting(weight: torch.Tensor, module: Linear4bit):
        made = make(weight, module)
        alive.append(sum(ref() is not None for ref in seen))
        return made

    monkeypatch.setattr(Decoded, "read", noted)
    monkeypatch.setattr(quantizer, "quantise", counting)
    _read(coded, quantize_experts=True)
    assert len(alive) > 10
    assert max(alive) == 1


@pytest.mark.parametrize(
    ("name", "method", "count", "experts", "told"),
    [
        ("mxfp4", "MXFP4", 8, False, "; experts stay as they are dequantised"),
        ("mxfp4", "MXFP4", 8, True, None),
        ("fp8-bf16", "FP8 with a scale for every 64x64", 14, False, None),
        ("int4-zeros", r"compressed-tensors \(int4\)", 14, False, None),
    ],
)
def test_a_start_tells_what_the_weights_were(name, method, count, experts, told, tmp_path, caplog):
    coded, plain = published(name, tmp_path)
    with caplog.at_level(logging.WARNING):
        _read(coded, quantize_experts=experts)
        (line,) = [r.getMessage() for r in caplog.records if "published" in r.getMessage()]
        caplog.clear()
        _read(plain, quantize_experts=experts)
        assert not caplog.records
    assert re.search(
        f"{coded}: published in {method}: {count} weights are dequantised to bfloat16, .*"
        "second rounding; [0-9]+ other matrices were published plainly: lm_head.weight, ",
        line,
    )
    assert (told is not None) == ("experts" in line)
    assert told is None or told in line


def test_what_is_broken_is_one_line_that_names_the_tensor(tmp_path):
    coded, _ = published("fp8-bf16", tmp_path)
    change(coded, lambda tensors: {k: v for k, v in tensors.items() if "q_proj.weight_s" not in k})
    with pytest.raises(ModelUnsupported, match=r"q_proj\.weight_scale_inv'.* missing") as caught:
        _read(coded)
    assert "\n" not in str(caught.value)
    nan = tmp_path / "nan"
    nan.mkdir()
    coded, _ = published("mxfp4", nan)
    change(coded, lambda t: {k: v | 0xFF if k.endswith("_scales") else v for k, v in t.items()})
    with pytest.raises(ModelUnsupported, match="_scales': a scale is NaN") as caught:
        _read(coded)
    with pytest.raises(ModelUnsupported, match="_scales': a scale is NaN"):
        quantize(str(coded), tmp_path / "out", device=CPU)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"quant_method": "hqq"}, "quantised with hqq; Fader reads unquantised .*MXFP4"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "quantised with fp8 of the form 'e5m2'"),
    ],
)
def test_other_methods_stay_refused(facts, told, tmp_path):
    coded, _ = published("fp8-bf16", tmp_path)
    read_config(str(coded))
    configure(coded, quantization_config=facts)
    with pytest.raises(ModelUnsupported, match=told):
        read_config(str(coded))


@pytest.mark.parametrize("name", ["mxfp4", "int4-group"])
def test_an_adapter_is_told_against_them_as_against_their_weights(name, tmp_path, capsys):
    coded, plain = published(name, tmp_path, torch.float32)
    adapter = write_adapter(plain, tmp_path / "one", rank=4, seed=3, target_modules=["o_proj"])
    (tmp_path / "twin").mkdir()
    twin = plain.rename(tmp_path / "twin" / "coded")  # inspect tells a folder by its name
    told = []
    for base in (coded, twin):
        assert main(["inspect", str(adapter), "--base", str(base)]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]


def test_the_same_weights_in_another_folder_of_a_repository_are_not_fetched(monkeypatch):
    """gpt-oss has them once more in the form of its maker."""
    asked: dict[str, list[str]] = {}
    monkeypatch.setattr(
        checkpoint, "snapshot_download", lambda _, **given: asked.update(given) or ""
    )
    checkpoint.local_copy("some/model")
    wanted = ["config.json", "model-1.safetensors", "model.safetensors.index.json"]
    others = ["original/model.safetensors", "consolidated.safetensors", "metal/model.bin"]
    assert list(filter_repo_objects([*wanted, *others], **asked)) == wanted
