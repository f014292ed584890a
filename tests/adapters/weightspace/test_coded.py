"""Checkpoints in the codes of other methods, read as the weights they are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fader_adapters.errors import BaseUnsupported, CheckpointInvalid
from fader_adapters.weightspace.base import open_base
from fader_adapters.weightspace.coded import Decoded
from fader_adapters.weightspace.decoding import Grid, microscaled, scaled
from fader_adapters.weightspace.merge import merge
from fader_adapters.weightspace.methods import method_of
from fader_adapters.weightspace.terms import Ingredient
from tests.adapters.weightspace import models
from tests.support.families import write_family
from tests.support.many_families import MANY, write_many
from tests.support.peft_adapters import write_adapter
from tests.support.published import (
    Form,
    Tensors,
    by_columns,
    change,
    compressed,
    fp8,
    mxfp4,
    publish,
)

FORMS: dict[str, tuple[str, Form]] = {
    "mxfp4": ("gpt-oss", mxfp4()),
    "fp8-blocks": ("qwen3-moe", fp8((32, 64))),
    "fp8-ragged": ("deepseek-v3", fp8((48, 96))),
    "fp8-tensor": ("qwen3-moe", fp8(None, activations=True)),
    "fp8-bf16": ("llama", fp8((64, 64), scale_dtype=torch.bfloat16)),
    "autofp8": ("llama", fp8(None, activations=True, scale="_scale")),
    "float-channel": ("qwen3-moe", compressed("float", 8, strategy="channel")),
    "float-tensor": ("llama", compressed("float", 8, strategy="tensor")),
    "float-fp32": (
        "llama", compressed("float", 8, strategy="channel", scale_dtype=torch.float32),
    ),
    "int4-group": ("qwen3-moe", compressed(group=32)),
    "int4-zeros": ("llama", compressed(group=64, symmetric=False)),
    "int4-ordered": ("llama", compressed(group=32, ordered=True)),
    "int8-channel": ("llama", compressed(bits=8, strategy="channel")),
    "gptq": ("qwen3-moe", by_columns()),
    "gptq-ordered": ("llama", by_columns(ordered=True)),
    "gptq-8": ("llama", by_columns(8, group=-1)),
    "gptq-v2": ("llama", by_columns(group=64, version="gptq_v2")),
    "awq": ("qwen3-moe", by_columns(awq=True)),
    "int8-plain": ("llama", compressed(bits=8, strategy="channel", form="int-quantized")),
}  # fmt: skip
LAYER = "model.layers.0"


def base_of(family: str, folder: Path) -> Path:
    return write_many(*MANY[family], folder) if family in MANY else write_family(family, folder)


def published(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    family, form = FORMS[name]
    return publish(base_of(family, folder / "base"), folder, form, dtype)


@pytest.mark.parametrize("name", FORMS)
def test_weights_are_those_of_the_plain_checkpoint(name: str, tmp_path: Path):
    coded, plain = published(name, tmp_path)
    files = open_base(coded).checkpoint
    wanted = load_file(plain / "model.safetensors")
    assert isinstance(files, Decoded)
    assert files.tensors.keys() == wanted.keys()
    for key, weight in wanted.items():
        stored, found = files.tensors[key], files.read(key)
        assert (stored.dtype, stored.shape) == (weight.dtype, weight.shape)
        assert (found.dtype, found.is_contiguous()) == (weight.dtype, True)
        assert torch.equal(found, weight), key
        assert torch.equal(torch.cat(list(files.chunks(key, elements=999))), weight.view(-1))
    one = next(iter(files.coded))
    nudged = {key: _nudged(value) for key, value in load_file(coded / "model.safetensors").items()}
    change(coded, lambda _: nudged)
    assert not torch.equal(open_base(coded).checkpoint.read(one), wanted[one])


def _nudged(value: torch.Tensor) -> torch.Tensor:
    """Scales become other ones."""
    if value.dtype == torch.uint8 and value.dim() == 3:
        return value + 1
    return value * 1.5 if value.dtype in (torch.float32, torch.float16, torch.bfloat16) else value


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("mxfp4", Mxfp4Config(dequantize=True)),
        ("fp8-blocks", FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 64))),
        ("fp8-tensor", FineGrainedFP8Config(dequantize=True, weight_block_size=None)),
        ("fp8-bf16", FineGrainedFP8Config(dequantize=True)),
    ],
)
def test_plain_checkpoints_are_what_transformers_dequantises(name, config, tmp_path: Path):
    """So that what is compared with them is compared with transformers."""
    coded, plain = published(name, tmp_path)
    theirs = models.load_unchecked(coded, quantization_config=config).state_dict()
    for key, weight in models.load(plain).state_dict().items():
        assert torch.equal(theirs[key], weight), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_code_and_scale_of_mxfp4_is_transformers(dtype: torch.dtype):
    g = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (1, 255, 3, 16), dtype=torch.uint8, generator=g)
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).expand(1, 255, 3)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)[0].T
    ours = microscaled(blocks.view(255, -1), scales[0], dtype)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, microscaled(blocks.view(255, -1), scales[0].flip(0), dtype))


def test_every_code_of_fp8_is_transformers():
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(torch.float8_e4m3fn)
    codes = torch.where(codes.float().isfinite(), codes.float(), 1.0).to(torch.float8_e4m3fn)
    scales = torch.tensor([[0.37, 1e-3], [4.4e-5, 77.0]])
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    for cuts in ((16,), (5, 11)):
        made = torch.full((16, 16), torch.nan, dtype=torch.bfloat16)
        scaled(codes.view(torch.uint8).split(cuts), scales, Grid(8, 8), made)
        assert not torch.equal(made, theirs)
        scaled((c.view(torch.float8_e4m3fn) for c in codes.view(torch.uint8).split(cuts)),
               scales, Grid(8, 8), made)  # fmt: skip
        assert torch.equal(made, theirs)


def test_the_last_blocks_of_a_weight_may_be_smaller():
    """transformers divides the weight evenly instead, where it can."""
    codes = torch.ones(192, 130).to(torch.float8_e4m3fn)
    made = torch.empty(192, 130)
    scaled([codes], torch.tensor([[1.0, 2.0], [3.0, 4.0]]), Grid(128, 128), made)
    assert made[127, 127] == 1
    assert made[127, 128] == 2
    assert made[128, 127] == 3
    assert made[191, 129] == 4


def _less(*ends: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(ends)}


def _with(key: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: make(v) if k.endswith(key) else v for k, v in tensors.items()}


def _more(key: str, value: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {key: value}


UP = f"{LAYER}.mlp.up_proj"
ODD = torch.zeros(3, 5)
EMPTY = {
    "a.weight": torch.zeros(0, 64).to(torch.float8_e4m3fn),
    "a.weight_scale_inv": torch.zeros(0, 1),
}
BROKEN = [
    ("mxfp4", _less("down_proj_scales"), "down_proj_blocks' .*down_proj_scales'.* is missing"),
    ("mxfp4", _less("_proj_blocks"), "says MXFP4, and its files hold no such weights"),
    ("mxfp4", _less("down_proj_blocks"), "down_proj_scales' belongs to no weight in MXFP4"),
    ("mxfp4", _with("_scales", lambda v: v[:, :, 1:].contiguous()), r"down_proj_blocks' .*shape"),
    ("mxfp4", _with("_blocks", lambda v: v.to(torch.int32)), "down_proj_blocks' is torch.int32"),
    ("mxfp4", _more(f"{LAYER}.mlp.experts.down_proj", ODD), "down_proj' is there by itself and as"),
    ("mxfp4", _more(f"{UP}.weight", ODD.to(torch.int8)), "up_proj.weight is int8, which MXFP4 has"),
    ("fp8-bf16", _less("k_proj.weight_scale_inv"), "k_proj.weight' .*weight_scale_inv'.* missing"),
    ("fp8-bf16", _with("k_proj.weight_scale_inv", lambda v: v[:0]), r"scale_inv' is of shape \(0"),
    ("fp8-ragged", _with("o_proj.weight_scale_inv", lambda v: v[1:]), r"o_proj.*expected \(3, 3\)"),
    ("fp8-bf16", _with("_scale_inv", lambda v: v.to(torch.int32)), "expected scales in floating"),
    ("fp8-bf16", lambda t: t | EMPTY, "a.weight' holds codes of nothing"),
    ("fp8-bf16", _more("model.norm.weight_scale_inv", ODD), "norm.weight_scale_inv' belongs to no"),
    ("fp8-bf16", _more("other.weight", ODD.to(torch.float8_e5m2)), "other.weight is float8_e5m2"),
    ("fp8-tensor", _with("_scale_inv", lambda v: v.repeat(2)), r"scale_inv' is of shape \(2,\)"),
    ("int4-group", _less("up_proj.weight_shape"), "up_proj.weight_packed' .*weight_shape'.* missi"),
    ("int4-group", _less(".weight_scale"), "weight_packed' .*weight_scale'.* is missing"),
    ("int4-group", _with(".weight_packed", lambda v: v[:, 1:].contiguous()), "expected int32 with"),
    ("int4-group", _with("up_proj.weight_scale", lambda v: v[:, 1:]), "by one scheme"),
    ("int4-zeros", _less(".weight_zero_point"), "weight_zero_point'.* is missing"),
    ("int4-zeros", _with(".weight_zero_point", lambda v: v[1:]), "weight_zero_point' is .*not one"),
    ("int4-ordered", _less(".weight_g_idx"), "weight_g_idx'.* is missing"),
    ("int4-ordered", _with(".weight_g_idx", lambda v: v[1:]), "weight_g_idx' is not of shape"),
    ("gptq", _less("q_proj.qzeros"), "q_proj.qweight' .*qzeros'.* is missing"),
    ("gptq", _less("q_proj.scales"), "q_proj.qweight' .*scales'.* is missing"),
    ("gptq", _less("q_proj.qweight"), "q_proj.g_idx' belongs to no weight in GPTQ"),
    ("gptq", _with("q_proj.scales", lambda v: v[1:]), "q_proj' has scales of shape"),
    ("awq", _with("q_proj.qzeros", lambda v: v[:, 1:]), "q_proj' has scales of shape"),
    ("gptq-ordered", _less("q_proj.g_idx"), "q_proj.qweight' .*g_idx'.* is missing"),
    ("gptq", _with("q_proj.g_idx", lambda v: v[1:]), "q_proj.g_idx' is not of shape"),
    ("awq", _with("q_proj.qweight", lambda v: v.float()), "q_proj.qweight' is torch.float32"),
    ("float-channel", _less("q_proj.weight_scale"), "q_proj.weight' .*weight_scale'.* is missing"),
    ("float-channel", _more(f"{UP}.weight_global_scale", ODD), "weight_global_scale' belongs to"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "how", "told"), BROKEN)
def test_what_is_not_whole_is_refused_by_name(name: str, how, told: str, tmp_path: Path):
    coded, _ = published(name, tmp_path)
    open_base(coded)
    change(coded, lambda tensors: {k: v.contiguous() for k, v in how(tensors).items()})
    with pytest.raises(CheckpointInvalid, match=told) as caught:
        open_base(coded)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "how", "told"),
    [
        ("mxfp4", _with("down_proj_scales", lambda v: v | 0xFF), "down_proj_scales': a scale is"),
        ("fp8-bf16", _with("_scale_inv", lambda v: v * torch.nan), "weight_scale_inv' has NaN"),
        ("gptq", _with("q_proj.g_idx", lambda v: v - 1), "q_proj.g_idx' names groups beyond"),
        ("awq", _with(".scales", lambda v: v / 0), ".scales' has NaN"),
        ("int4-ordered", _with("_g_idx", lambda v: v + 9), "weight_g_idx' names groups beyond"),
    ],
)
def test_values_that_mean_nothing_are_refused_when_they_are_read(name, how, told, tmp_path: Path):
    coded, _ = published(name, tmp_path)
    files = open_base(change(coded, how)).checkpoint
    assert isinstance(files, Decoded)
    with pytest.raises(CheckpointInvalid, match=told):
        list(map(files.read, files.coded))


@pytest.mark.parametrize(
    ("told", "files", "found"),
    [
        ("float16", torch.bfloat16, torch.float16),
        (None, torch.float32, torch.float32),
        (None, torch.float16, torch.float16),
    ],
)
def test_weights_are_of_the_dtype_that_the_config_or_the_files_tell(told, files, found, tmp_path):
    coded, _ = published("fp8-bf16", tmp_path, files)
    models.configure(coded, dtype=told)
    opened = open_base(coded).checkpoint
    assert isinstance(opened, Decoded)
    assert {opened.read(key).dtype for key in opened.coded} == {found}


def _groups(**weights: object) -> dict[str, object]:
    told = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": told}},
    }


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({}, "a method that its config does not name"),
        ({"quant_method": "gptq", "bits": 3}, "gptq in 3 bits"),
        ({"quant_method": "gptq", "group_size": 0}, "groups of 0"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "gptq in the form marlin"),
        ({"quant_method": "gptq", "dynamic": {"a": {"bits": 8}}}, "gptq in the form dynamic"),
        ({"quant_method": "awq", "version": "gemv"}, "awq of version gemv"),
        ({"quant_method": "awq", "bits": 8}, "awq in 8 bits"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "e5m2"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
        ({"quant_method": "compressed-tensors"}, "without config_groups"),
        (_groups(num_bits=3), "int3"),
        (_groups(type="float"), "float4"),
        (_groups(dynamic=True), "int4"),
        (_groups(strategy="tensor_group"), "tensor_group"),
        (_groups() | {"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        (_groups() | {"transform_config": {"config_groups": {}}}, "transform_config"),
        (_groups() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    ],
)
def test_methods_that_are_not_read_are_told(facts, told: str):
    method_of(_groups())
    with pytest.raises(BaseUnsupported, match=told):
        method_of(facts)


def test_two_schemes_are_told_apart_by_their_scales_or_refused(tmp_path: Path):
    coded, _ = published("int4-group", tmp_path)
    facts = _groups()
    groups = facts["config_groups"]
    assert isinstance(groups, dict)
    groups["group_1"] = {"weights": {**groups["group_0"]["weights"], "group_size": 64}}
    models.configure(coded, quantization_config=facts)
    open_base(coded)
    groups["group_1"] = {"weights": {**groups["group_0"]["weights"], "group_size": 40}}
    models.configure(coded, quantization_config=facts)
    with pytest.raises(CheckpointInvalid, match="by one scheme"):
        open_base(coded)


@pytest.mark.parametrize("form", ["bf16", "nf4"])
@pytest.mark.parametrize("name", ["mxfp4", "int4-group", "fp8-tensor"])
def test_merges_are_those_of_the_plain_checkpoint(name: str, form, tmp_path: Path):
    coded, plain = published(name, tmp_path)
    spec = open_base(plain).spec
    experts = [item.path for item in spec.linears if item.role == "experts"]
    adapter = write_adapter(
        plain, tmp_path / "one", rank=4, seed=3, scale=0.3,
        target_modules=["o_proj"], target_parameters=experts[:1],
    )  # fmt: skip
    for base in (coded, plain):
        done = merge(base, [Ingredient(adapter)], tmp_path / f"{base.name}-out", form=form)
        assert {loss["path"] for loss in done.report["linears"]} > set(experts[:1])
    one, other = (tmp_path / f"{base.name}-out" for base in (coded, plain))
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    for name in set(names) - {"merge_report.json", "merge_manifest.json"}:
        if name.endswith(".json"):  # which says nothing of how the base was published
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], weight) for key, weight in theirs.items())
