"""Reading, quantising and refusing bases."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import cast

import httpx2
import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.models.falcon import modeling_falcon as falcon_code

from fader_adapters.kernels.backend import choose
from fader_adapters.weightspace.base import open_base
from fader_server import demo
from fader_server.errors import ConfigInvalid, ModelUnsupported
from fader_server.model import checkpoint
from fader_server.model.checkpoint import read_config
from fader_server.model.loaded import LoadedBase
from fader_server.model.loader import load_base
from fader_server.model.writing import quantize
from fader_server.peft_side import nf4_model
from tests.support.families import CONFIGS, write_family
from tests.support.oracle import nf4_oracle
from tests.support.peft_adapters import write_adapter

CPU = torch.device("cpu")
ROPE = {"rope_type": "default", "rope_theta": 12345.0}


def _load(source: Path | str, dtype: torch.dtype = torch.float32) -> LoadedBase:
    return load_base(str(source), dtype=dtype, device=CPU, backend=choose(CPU, dtype))


def _weights(base: LoadedBase) -> dict[int, torch.Tensor]:
    return {s.spec.linears[0]: s.kernel.base.dense(torch.float32) for s in base.installed.sites}


def _digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family("llama", tmp_path_factory.mktemp("loader") / "llama")


def test_quantised_checkpoint_loads_to_the_same_bytes_and_is_not_rewritten(llama, tmp_path):
    quantize(str(llama), tmp_path / "nf4", device=CPU)
    before = _digests(tmp_path / "nf4")
    plain, ready = _load(llama), _load(tmp_path / "nf4")
    assert _digests(tmp_path / "nf4") == before
    for index, weight in _weights(plain).items():
        assert torch.equal(_weights(ready)[index], weight)
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is True


def test_a_checkpoint_is_written_whole_or_not_at_all(llama, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigInvalid, match="is no directory"):
        quantize(str(llama), tmp_path / "file", device=CPU)
    with pytest.raises(ConfigInvalid, match="cannot be written"):
        quantize(str(llama), Path("/proc/of/nowhere"), device=CPU)
    for error in (OSError(28, "No space left on device"), SafetensorError("No space left")):

        def full(self, folder, *, error=error, **others):
            (folder / "model.safetensors").write_text("half")
            raise error

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(ConfigInvalid, match=r"cannot be written: .*No space"):
            quantize(str(llama), tmp_path / "nf4", device=CPU)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "nf4").mkdir()
    quantize(str(llama), tmp_path / "nf4", device=CPU)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nf4"]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), Exception("No space left (os error 28)")]
)
def test_a_tokenizer_that_the_disk_has_no_room_for_leaves_nothing(
    llama, tmp_path, monkeypatch, error, there
):
    target = tmp_path / "nf4"
    if there:
        target.mkdir()

    def full(self, folder):
        raise error

    class Words:
        save_pretrained = full

    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *given, **others: Words()
    )
    with pytest.raises(ConfigInvalid, match=r"cannot be written: .*No space"):
        quantize(str(llama), target, device=CPU)
    assert [path.name for path in tmp_path.rglob("*")] == (["nf4"] if there else [])


def test_an_empty_folder_stays_the_one_it_is(llama, tmp_path, monkeypatch):
    """It may be a mount, or where the user stands."""
    target = tmp_path / "nf4"
    target.mkdir()
    inode = target.stat().st_ino
    monkeypatch.chdir(target)
    quantize(str(llama), Path("."), device=CPU)
    assert target.stat().st_ino == inode
    assert {"config.json", "model.safetensors"} <= {path.name for path in target.iterdir()}
    assert not list(target.glob(".*"))
    assert [path.name for path in tmp_path.iterdir()] == ["nf4"]


def test_quantised_checkpoint_is_readable_by_transformers(llama, tmp_path):
    quantize(str(llama), tmp_path / "nf4", device=CPU)
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.inference_mode():
        theirs = nf4_oracle(llama, torch.float32)(input_ids=ids).logits
        ours = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "nf4", device_map={"": "cpu"}, dtype=torch.float32
        )(input_ids=ids).logits
    assert (ours - theirs).abs().max() < 0.2  # bitsandbytes' own CPU path rounds to bf16
    assert (ours[0].argmax(-1) == theirs[0].argmax(-1)).float().mean() > 0.8


def test_quantising_twice_or_into_a_full_folder_is_refused(llama, tmp_path):
    quantize(str(llama), tmp_path / "nf4", device=CPU)
    with pytest.raises(ConfigInvalid, match="not empty"):
        quantize(str(llama), tmp_path / "nf4", device=CPU)
    with pytest.raises(ConfigInvalid, match="quantised already"):
        quantize(str(tmp_path / "nf4"), tmp_path / "again", device=CPU)


def test_every_linear_inside_the_layers_is_a_site_and_shared_inputs_are_one(llama):
    base = _load(llama)
    inside = [linear for linear in base.installed.spec.linears if linear.inside]
    assert len(inside) == 2 * 7
    assert len(base.installed.sites) == 2 * 4
    assert base.installed.nbytes < 0.6 * sum(
        linear.in_features * linear.out_features for linear in inside
    )


def test_head_and_embedding_are_targets_outside_the_layers_and_take_no_more_room(llama):
    base = _load(llama)
    outside = [linear for linear in base.installed.spec.linears if not linear.inside]
    assert [(linear.path, linear.role) for linear in outside] == [
        ("model.embed_tokens", "embedding"),
        ("lm_head", "head"),
    ]
    weights = sum(linear.in_features * linear.out_features for linear in outside) * 4
    rest = sum(p.nbytes for p in base.model.parameters() if p.dim() == 1)
    rest += sum(buffer.nbytes for buffer in base.model.buffers())
    assert base.nbytes == base.installed.nbytes + weights + rest


def test_fingerprints_tell_shapes_apart_and_nothing_else(llama, tmp_path):
    other = write_family("mistral", tmp_path / "mistral")
    again = write_family("llama", tmp_path / "llama2", seed=9)
    prints = [_load(p).installed.spec.fingerprint for p in (llama, other, again)]
    assert prints[0] == prints[2] != prints[1]


def _identity(path: Path, dtype: torch.dtype = torch.float32) -> str:
    return _load(path, dtype).installed.spec.identity


def test_the_identity_of_a_base_is_that_of_its_weights(llama, tmp_path):
    """Whoever quantised them and whatever runs them; one weight or one number of the config is
    enough to tell two apart."""
    own = _identity(llama)
    quantize(str(llama), tmp_path / "nf4", device=CPU)
    same = [
        llama,
        tmp_path / "nf4",
        Path(shutil.copytree(llama, tmp_path / "copy")),
        _edited(llama, tmp_path / "stored", transformers_version="0", architectures=["Other"]),
    ]
    assert {_identity(path) for path in same} == {own}
    assert _identity(llama, torch.bfloat16) == own
    others = [
        write_family("llama", tmp_path / "seed", seed=9),
        _edited(llama, tmp_path / "theta", rope_parameters=ROPE),
        _edited(llama, tmp_path / "eps", rms_norm_eps=0.5),
        *(_nudged(llama, tmp_path / name, name) for name in (
            "model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight",
        )),
    ]  # fmt: skip
    found = [_identity(path) for path in others]
    assert len({own, *found}) == len(others) + 1


def _nudged(source: Path, target: Path, name: str) -> Path:
    """The same base with one weight of one tensor changed to another sign."""
    shutil.copytree(source, target)
    (path,) = target.glob("*.safetensors")
    tensors = load_file(path)
    flat = tensors[name].view(-1)
    flat[flat.abs().argmax()] *= -1
    save_file(tensors, path, metadata={"format": "pt"})
    return target


def test_nothing_at_the_path_is_a_mistake_of_the_user(tmp_path):
    with pytest.raises(ConfigInvalid, match="no model at"):
        _load(tmp_path / "missing")


def test_a_folder_that_is_no_base_is_told_from_one_that_is_an_adapter(tmp_path):
    with pytest.raises(ConfigInvalid, match=r"has no config\.json"):
        _load(tmp_path)
    with pytest.raises(ConfigInvalid, match="holds an adapter, expected a base"):
        _load(demo.adapter_dirs()["shout"])


def _edited(source: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "novel", "auto_map": {"AutoConfig": "code.Novel"}}, "remote code"),
        ({"model_type": "never-heard-of"}, "never-heard-of"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "gptq in 3 bits"),
        ({"quantization_config": {"quant_method": "hqq"}}, "hqq"),
        ({"quantization_config": {"bits": 4}}, "a method that its config does not name"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            "quantised with bitsandbytes, in 8-bit",
        ),
        (
            {"rope_parameters": {"rope_type": "novel", "rope_theta": 1e4}},
            r"rope_type in rope_parameters \(rope_scaling\) is 'novel', of no known kind",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "bitsandbytes",
                    "load_in_4bit": True,
                    "bnb_4bit_quant_type": "fp4",
                }
            },
            "fp4",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(llama, tmp_path, changes, reason):
    with pytest.raises(ModelUnsupported, match=reason) as caught:
        _load(_edited(llama, tmp_path / "edited", **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation"])
def test_an_attention_that_is_not_installed_may_be_named_in_the_config(llama, tmp_path, name):
    named = _edited(llama, tmp_path / "named", **{name: "flash_attention_2"})
    with pytest.raises(ImportError, match="FlashAttention2"):
        transformers.AutoModelForCausalLM.from_pretrained(named)
    assert _identity(named) == _identity(llama)
    assert open_base(named).spec.fingerprint == open_base(llama).spec.fingerprint


def test_an_adapter_beside_a_bases_weights_is_left_out(llama, tmp_path):
    beside = Path(shutil.copytree(llama, tmp_path / "base"))
    adapter = write_adapter(llama, tmp_path / "adapter", rank=4, seed=1)
    for file in adapter.iterdir():
        shutil.copy(file, beside)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(beside)
    assert any("lora" in name for name, _ in theirs.named_modules())
    assert _identity(beside) == _identity(llama)
    assert not any(
        "lora" in name for name, _ in nf4_model(str(beside), torch.float32).named_modules()
    )


def _save(config: transformers.PretrainedConfig, auto: type, target: Path) -> Path:
    auto.from_config(config).save_pretrained(target)
    return target


def test_models_that_are_not_causal_decoders_are_refused(tmp_path):
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertConfig(
        **small, intermediate_size=64, vocab_size=64, initializer_range=0.5
    )
    t5 = transformers.T5Config(d_model=64, d_kv=32, d_ff=64, num_layers=1, vocab_size=64)
    tower = {**small, "intermediate_size": 64, "image_size": 28, "patch_size": 14}
    clip = transformers.CLIPConfig(
        text_config={**small, "intermediate_size": 64, "vocab_size": 64}, vision_config=tower
    )
    for name, config, auto, reason in (
        ("bert", bert, transformers.AutoModelForMaskedLM, "depend on those behind it"),
        ("t5", t5, transformers.AutoModelForSeq2SeqLM, "not a decoder-only language model"),
        ("clip", clip, transformers.AutoModel, "not a decoder-only language model"),
        ("vit", transformers.ViTConfig(**tower), transformers.AutoModel, "not a decoder-only"),
    ):
        with pytest.raises(ModelUnsupported, match=reason):
            _load(_save(config, auto, tmp_path / name))


def _falcon(target: Path) -> Path:
    config = transformers.FalconConfig(
        hidden_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=64, bias=True
    )
    return _save(config, transformers.AutoModelForCausalLM, target)


def test_linears_of_a_class_that_computes_the_same_are_quantised(tmp_path):
    """Falcon's, which bitsandbytes leaves as they are."""
    falcon = _falcon(tmp_path / "falcon")
    base = _load(falcon)
    assert len([linear for linear in base.installed.spec.linears if linear.inside]) == 4
    quantize(str(falcon), tmp_path / "nf4", device=CPU)
    assert _identity(tmp_path / "nf4") == base.installed.spec.identity
    files = open_base(falcon), open_base(tmp_path / "nf4")
    for linear in files[0].spec.linears:
        if linear.inside:
            assert [f.is_packed(f.keys(linear)[0]) for f in files] == [False, True]
            assert linear.path in files[0].quantisable
    theirs = nf4_model(str(falcon), torch.float32).get_submodule(
        "transformer.h.0.mlp.dense_h_to_4h"
    )
    spec = base.installed.spec
    (index,) = [i for i, item in enumerate(spec.linears) if item.path.endswith("dense_h_to_4h")]
    assert torch.equal(cast("nn.Linear", theirs).weight, _weights(base)[index])


def test_linears_that_compute_more_are_refused_by_name(tmp_path, monkeypatch):
    own = falcon_code.FalconLinear.forward
    monkeypatch.setattr(falcon_code.FalconLinear, "forward", lambda self, x: own(self, x) * 2)
    with pytest.raises(ModelUnsupported, match=r"no linear .*FalconLinear.* more than x·Wᵀ \+ b"):
        _load(_falcon(tmp_path / "falcon"))


def test_a_width_that_splits_blocks_is_refused_with_the_module(tmp_path):
    config = CONFIGS["llama"]()
    config.intermediate_size = 96
    target = _save(config, transformers.AutoModelForCausalLM, tmp_path / "narrow")
    with pytest.raises(ModelUnsupported, match=r"down_proj.*96 is not a multiple of 64"):
        _load(target)


def test_corrupt_and_incomplete_checkpoints_are_refused_in_one_line(llama, tmp_path):
    for name, damage in (("cut", _cut), ("gone", _drop_tensor), ("pickle", _only_pickle)):
        target = tmp_path / name
        shutil.copytree(llama, target)
        damage(target)
        with pytest.raises((ModelUnsupported, ConfigInvalid)) as caught:
            _load(target)
        assert "\n" not in str(caught.value), name


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def _drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    copies = {k: v.clone() for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k}
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def test_a_base_whose_first_forward_fails_is_refused_in_one_line(llama, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("wants pixels\nand much more")

    monkeypatch.setattr(transformers.LlamaModel, "forward", fail)
    reason = r"first forward failed: wants pixels; one by one: wants pixels$"
    with pytest.raises(ModelUnsupported, match=reason):
        _load(llama)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    asked: list[str] = []
    faults: list[Exception] = [httpx2.ConnectError("no network"), httpx2.ReadTimeout("slow")]

    def ask(url: str) -> None:
        asked.append(url)
        raise faults[len(asked) - 1]

    def retry(*_: object, **__: object) -> None:
        raise OSError("the words of transformers")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(checkpoint, "get_hf_file_metadata", ask)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", retry)
    for fault in list(faults):
        with pytest.raises(ConfigInvalid, match=f"'no/such-model'.*does not answer .{fault}"):
            read_config("no/such-model")
    faults.append(OSError("404"))  # an answer
    with pytest.raises(ConfigInvalid, match="the words of transformers"):
        read_config("no/such-model")
    assert len(asked) == 3
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigInvalid, match="the words of transformers"):
        read_config("no/such-model")
    assert len(asked) == 3
