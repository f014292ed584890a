"""Checkpoints as other methods of quantisation publish them, each beside one that holds the same
weights plainly. Written by the formats' definitions; knows nothing of Fader's reading."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 += [-value for value in E2M1]


@dataclass(frozen=True)
class Encoded:
    """What lies in the files for one weight, and the weight that this is, in a wide dtype."""

    tensors: Tensors
    weight: torch.Tensor


Encoder = Callable[[str, torch.Tensor], Encoded | None]
"""None: the weight stays as it is."""


@dataclass(frozen=True)
class Form:
    """One way to publish a base."""

    encode: Encoder
    facts: Mapping[str, Any] = field(default_factory=dict)
    """quantization_config"""


def publish(base: Path, folder: Path, form: Form, dtype: torch.dtype) -> tuple[Path, Path]:
    """`folder`/coded and `folder`/plain of the base in `base`; what is plain is in `dtype`."""
    coded: Tensors = {}
    plain: Tensors = {}
    for key, value in load_file(base / "model.safetensors").items():
        made = form.encode(key, value)
        plain[key] = (value if made is None else made.weight).to(dtype).contiguous()
        coded |= {key: plain[key]} if made is None else made.tensors
    assert coded.keys() != plain.keys() or any(coded[k].dtype != plain[k].dtype for k in coded)
    config = json.loads((base / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    for name, tensors, facts in (
        ("coded", coded, {"quantization_config": dict(form.facts)}),
        ("plain", plain, {}),
    ):
        shutil.copytree(base, folder / name)
        save_file(
            {key: value.contiguous() for key, value in tensors.items()},
            folder / name / "model.safetensors",
            metadata={"format": "pt"},
        )
        (folder / name / "config.json").write_text(json.dumps(config | facts))
    return folder / "coded", folder / "plain"


def change(folder: Path, how: Callable[[Tensors], Tensors]) -> Path:
    """The folder with other tensors in its file."""
    file = folder / "model.safetensors"
    save_file(how(load_file(file)), file, metadata={"format": "pt"})
    return folder


def mxfp4() -> Form:
    """As gpt-oss is published: experts only, transposed against what its model holds."""

    def encode(key: str, value: torch.Tensor) -> Encoded | None:
        if not key.endswith((".gate_up_proj", ".down_proj")):
            return None
        rows = value.mT.double()  # [experts, out, width]
        blocks = rows.reshape(*rows.shape[:-1], -1, 32)
        top = blocks.abs().amax(-1)
        exponents = torch.log2(top.clamp(min=1e-30)).floor().to(torch.int64) - 2
        step = 2.0 ** exponents[..., None].double()
        codes = (blocks[..., None] / step[..., None] - torch.tensor(E2M1)).abs().argmin(-1)
        codes = codes.to(torch.uint8)
        weight = (torch.tensor(E2M1).double()[codes.long()] * step).view(rows.shape).mT
        return Encoded(
            {
                f"{key}_blocks": codes[..., 0::2] | (codes[..., 1::2] << 4),
                f"{key}_scales": (exponents + 127).to(torch.uint8),
            },
            weight,
        )

    return Form(encode, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def fp8(
    block: tuple[int, int] | None = (128, 128),
    *,
    activations: bool = False,
    scale: str = "_scale_inv",
    scale_dtype: torch.dtype = torch.float32,
) -> Form:
    """Every linear of the layers, experts' own ones too."""

    def encode(key: str, value: torch.Tensor) -> Encoded | None:
        if not key.endswith("proj.weight"):
            return None
        rows, columns = block or value.shape
        of_row = (torch.arange(value.shape[0]) // rows)[:, None]
        of_column = torch.arange(value.shape[1]) // columns
        scales = (_top(value.float(), rows, columns) / 448).to(scale_dtype)
        wide = scales[of_row, of_column].float()
        codes = (value / wide).to(torch.float8_e4m3fn)
        module = key.removesuffix(".weight")
        tensors = {key: codes, f"{key}{scale}": scales if block else scales.reshape(())}
        if activations:
            tensors[f"{module}.activation_scale"] = torch.tensor(0.5)
        return Encoded(tensors, codes.float() * wide)

    facts = {
        "quant_method": "fp8",
        "activation_scheme": "static" if activations else "dynamic",
        "weight_block_size": block and list(block),
        "modules_to_not_convert": ["lm_head"],
    }
    return Form(encode, facts)


def compressed(
    kind: str = "int",
    bits: int = 4,
    *,
    strategy: str = "group",
    group: int | None = None,
    symmetric: bool = True,
    ordered: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
    form: str = "",
) -> Form:
    """Every linear of the layers in compressed-tensors' words. `ordered`: columns choose groups."""

    def encode(key: str, value: torch.Tensor) -> Encoded | None:
        if not key.endswith("proj.weight"):
            return None
        module, (out, width) = key.removesuffix(".weight"), value.shape
        rows, columns = (out, width) if strategy == "tensor" else (1, group or width)
        top = 448 if kind == "float" else (1 << (bits - 1)) - 1
        scales = (_top(value.float(), rows, columns) / top).to(scale_dtype)
        of_row, of_column = (torch.arange(out) // rows)[:, None], torch.arange(width) // columns
        tensors = {}
        if ordered:
            of_column = of_column[torch.randperm(width, generator=torch.Generator().manual_seed(3))]
            tensors[f"{module}.weight_g_idx"] = of_column.to(torch.int32)
        wide = scales[of_row, of_column].float()
        zeros = torch.zeros_like(scales, dtype=torch.int8)
        if not symmetric:
            zeros = (torch.arange(zeros.numel()).view_as(zeros) % 5 - 2).to(torch.int8)
        shifted = value / wide + zeros[of_row, of_column]
        if kind == "float":
            codes = shifted.to(torch.float8_e4m3fn)
        else:
            codes = shifted.round().clamp(-top - 1, top).to(torch.int8)
        number = codes.to(scale_dtype) - zeros[of_row, of_column].to(scale_dtype)
        weight = number * scales[of_row, of_column]
        scales = scales.reshape(1) if strategy == "tensor" else scales
        tensors |= {f"{module}.weight_scale": scales, f"{module}.input_scale": torch.tensor(0.5)}
        if form != "pack-quantized":
            return Encoded(tensors | {key: codes}, weight)
        tensors[f"{module}.weight_packed"] = _words(codes, bits)
        tensors[f"{module}.weight_shape"] = torch.tensor([out, width])
        if not symmetric:
            tensors[f"{module}.weight_zero_point"] = _words(zeros.T, bits).T
        return Encoded(tensors, weight)

    form = form or ("float-quantized" if kind == "float" else "pack-quantized")
    weights = {
        "num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy,
        "group_size": group, "dynamic": False, "actorder": "group" if ordered else None,
    }  # fmt: skip
    facts = {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    return Form(encode, facts)


def by_columns(
    bits: int = 4,
    *,
    group: int = 32,
    awq: bool = False,
    ordered: bool = False,
    version: str = "gptq",
) -> Form:
    """Every linear of the layers as GPTQ's tools write it, or AWQ's."""
    each, half = 32 // bits, 1 << (bits - 1)

    def encode(key: str, value: torch.Tensor) -> Encoded | None:
        if not key.endswith("proj.weight"):
            return None
        module, width = key.removesuffix(".weight"), value.shape[1]
        size = width if group == -1 else group
        scales = (_top(value.float(), 1, size) / (half - 1)).half()  # [out, groups]
        of_column = torch.arange(width) // size
        if ordered:
            of_column = of_column[torch.randperm(width, generator=torch.Generator().manual_seed(3))]
        zeros = half + torch.arange(scales.numel()).view_as(scales) % 3 - 1
        codes = (value / scales[:, of_column].float() + zeros[:, of_column]).round()
        codes = codes.clamp(0, 2 * half - 1).long()
        weight = (codes - zeros[:, of_column]).half() * scales[:, of_column]
        tensors = {f"{module}.scales": scales.T}
        if awq:
            tensors[f"{module}.qweight"] = _words(_awq_order(codes.T) - half, bits)
            tensors[f"{module}.qzeros"] = _words(_awq_order(zeros.T) - half, bits)
            return Encoded(tensors, weight)
        less = 1 if version == "gptq" else 0
        tensors[f"{module}.qweight"] = _words(codes - half, bits).T
        tensors[f"{module}.qzeros"] = _words(zeros.T - half - less, bits)
        tensors[f"{module}.g_idx"] = of_column.to(torch.int32)
        return Encoded(tensors, weight)

    assert each == 8 or not awq
    facts = {"bits": bits, "group_size": group, "quant_method": "awq" if awq else "gptq"}
    told = {"version": "gemm", "zero_point": True} if awq else {"checkpoint_format": version}
    return Form(encode, {**facts, **told, "desc_act": ordered})


def _awq_order(numbers: torch.Tensor) -> torch.Tensor:
    """Eight numbers as they follow each other in a word."""
    return numbers.reshape(len(numbers), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1)


def _top(value: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The largest number of each block, never 0; the last blocks may be smaller."""
    return torch.stack(
        [
            torch.stack([part.abs().max().clamp(min=1e-6) for part in band.split(columns, dim=1)])
            for band in value.split(rows)
        ]
    )


def _words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """int32, the first number in the lowest bits."""
    each = 32 // bits
    rows, width = numbers.shape
    made = torch.zeros(rows, -(-width // each), dtype=torch.int64)
    for at in range(width):
        stored = numbers[:, at].long() + (1 << (bits - 1))
        made[:, at // each] |= stored << (bits * (at % each))
    return torch.where(made >= 1 << 31, made - (1 << 32), made).to(torch.int32)
