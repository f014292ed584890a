"""Quantising while a checkpoint is read: bitsandbytes' bytes, one weight at a time."""

import gc
import hashlib
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from fader_adapters.kernels import native
from fader_adapters.kernels.backend import choose
from fader_adapters.kernels.cpu import NativeHead
from fader_server.errors import ModelUnsupported
from fader_server.model import checkpoint, loader, quantizer
from fader_server.model.checkpoint import read_config, read_nf4
from fader_server.model.head import NativeEmbedding
from fader_server.model.loader import load_base
from fader_server.model.writing import quantize
from tests.support.families import write_family

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())


def _write(family: str, target: Path, dtype: str, change: Callable[[dict], None] | None = None):
    """A checkpoint of `family` in `dtype`, its tensors changed by `change`."""
    write_family(family, target)
    tensors = {k: v.to(DTYPES[dtype]) for k, v in load_file(target / "model.safetensors").items()}
    if change:
        change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    return target


def _files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    """Every weight that reached the native quantiser, not kept alive."""
    seen: list[weakref.ref] = []
    original = native.quantise_nf4

    def noted(weight: torch.Tensor, *, nested: bool = False) -> native.Quantised:
        seen.append(weakref.ref(weight))
        return original(weight, nested=nested)

    monkeypatch.setattr(quantizer.native, "quantise_nf4", noted)
    return seen


def _by_bitsandbytes(monkeypatch: pytest.MonkeyPatch, source: Path, target: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.native, "available", lambda: False)
        quantize(str(source), target, device=CPU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpoint_equals_bitsandbytes_byte_for_byte(family, dtype, tmp_path, monkeypatch, calls):
    source = _write(family, tmp_path / "source", dtype)
    _by_bitsandbytes(monkeypatch, source, tmp_path / "theirs")
    assert not calls
    quantize(str(source), tmp_path / "ours", device=CPU)
    assert len(calls) == {"llama": 2 * 7, "gpt2": 2 * 4}[family]
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    assert any(name.endswith("nested_absmax") for name in ours)
    assert _files(tmp_path / "ours") == _files(tmp_path / "theirs")


def test_another_weight_gives_another_checkpoint(tmp_path, monkeypatch):
    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] *= -1

    _by_bitsandbytes(monkeypatch, _write("llama", tmp_path / "a", "float32"), tmp_path / "theirs")
    quantize(str(_write("llama", tmp_path / "b", "float32", nudge)), tmp_path / "ours", device=CPU)
    theirs, ours = _files(tmp_path / "theirs"), _files(tmp_path / "ours")
    assert {name for name in ours if ours[name] != theirs[name]} == {"model.safetensors"}


def test_weights_are_quantised_one_by_one_as_they_are_read(tmp_path, calls, monkeypatch):
    alive: list[int] = []
    make = quantizer.quantise

    def counting(weight: torch.Tensor, module: Linear4bit):
        made = make(weight, module)
        alive.append(sum(ref() is not None for ref in calls))
        return made

    monkeypatch.setattr(quantizer, "quantise", counting)
    source = str(_write("llama", tmp_path / "source", "bfloat16"))
    read_nf4(source, read_config(source), device=CPU, attn_implementation=None)
    assert alive == [1] * 14


def test_the_loaded_model_says_bitsandbytes_and_nothing_of_ours_is_saved(tmp_path):
    source = str(_write("llama", tmp_path / "source", "bfloat16"))
    model = read_nf4(source, read_config(source), device=CPU, attn_implementation=None)
    config = model.config.quantization_config
    assert config.quant_method == "bitsandbytes"
    assert model.quantization_method == "bitsandbytes"
    assert quantizer.METHOD not in model.config.to_json_string()
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        source,
        device_map={"": "cpu"},
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True),
    )
    assert not isinstance(plain.hf_quantizer, quantizer.Nf4Quantizer)
    assert AUTO_QUANTIZER_MAPPING[quantizer.METHOD] is quantizer.Nf4Quantizer


def test_non_finite_weights_are_refused_in_one_line_that_says_so(tmp_path):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = torch.nan

    source = _write("llama", tmp_path / "nan", "float32", spoil)
    with pytest.raises(ModelUnsupported, match=r"layers\.0\.mlp\.up_proj.*NaN") as caught:
        quantize(str(source), tmp_path / "nf4", device=CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ready", [False, True])
def test_originals_are_freed_as_soon_as_they_are_repacked(ready, tmp_path, monkeypatch):
    source = _write("llama", tmp_path / "source", "bfloat16")
    if ready:
        quantize(str(source), tmp_path / "nf4", device=CPU)
        source = tmp_path / "nf4"
    originals: list[weakref.ref] = []

    def noted(*args, **kwargs):
        model = read_nf4(*args, **kwargs)
        originals.extend(
            weakref.ref(m.weight) for m in model.modules() if isinstance(m, Linear4bit)
        )
        assert all(ref() is not None for ref in originals)
        return model

    monkeypatch.setattr(loader, "read_nf4", noted)
    gc.collect()
    gc.disable()
    try:
        base = load_base(
            str(source), dtype=torch.bfloat16, device=CPU, backend=choose(CPU, torch.bfloat16)
        )
        inside = [item for item in base.installed.spec.linears if item.role == "linear"]
        assert len(originals) == len(inside) == 14
        assert not [ref for ref in originals if ref() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_the_ends_of_a_model_move_beside_the_weights_and_a_tied_weight_stays_one(family, tmp_path):
    source = write_family(family, tmp_path / family)
    own = transformers.AutoModelForCausalLM.from_pretrained(source)
    base = load_base(
        str(source), dtype=torch.float32, device=CPU, backend=choose(CPU, torch.float32)
    )
    head, embedding = base.model.get_output_embeddings(), base.model.get_input_embeddings()
    assert isinstance(base.installed.head.kernel, NativeHead)
    assert isinstance(embedding.inner, NativeEmbedding) is own.config.tie_word_embeddings
    ids = torch.tensor([[3, 0, 41]])
    with torch.inference_mode():
        rows = own.get_input_embeddings()(ids)
        assert torch.equal(embedding(ids), rows)
        assert not torch.equal(embedding(ids + 1), rows)
        logits = own.get_output_embeddings()(rows)
        assert torch.allclose(head(rows), logits, atol=1e-5)
        assert not torch.allclose(head(rows + 1), logits, atol=1e-5)
