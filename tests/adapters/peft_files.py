"""PEFT-format adapters written by hand, so that tests can get every byte of them wrong."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from fader_adapters.limits import Limits
from fader_adapters.parse import ParsedAdapter, read_adapter
from fader_adapters.source import CONFIG_FILE, WEIGHTS_FILE, RawAdapter
from fader_adapters.spec import BaseSpec, Digest, LinearSpec

SHAPES = {"self_attn.q_proj": (64, 64), "self_attn.v_proj": (64, 32), "mlp.down_proj": (96, 64)}
"""Module below a layer → (in, out)."""
LAYERS = 3
TARGETS = ("q_proj", "v_proj", "down_proj")


def make_base(prefix: str = "model.", *, head: bool = True) -> BaseSpec:
    """A base of three layers with three linears each, and an output head outside the layers."""
    linears = [
        LinearSpec(f"{prefix}layers.{layer}.{name}", inputs, outputs, layer)
        for layer in range(LAYERS)
        for name, (inputs, outputs) in SHAPES.items()
    ]
    if head:
        linears.append(LinearSpec("lm_head", 64, 128, None, role="head"))
    return BaseSpec(tuple(linears), Digest("0" * 64), "test")


BASE = make_base()


def make_config(**changes: Any) -> dict[str, Any]:
    """What PEFT writes, with changes; a change to `...` removes the key."""
    config = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": "tiny/base",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(TARGETS),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    config.update(changes)
    return {key: value for key, value in config.items() if value is not ...}


def make_tensors(
    base: BaseSpec = BASE,
    targets: Iterable[str] = TARGETS,
    *,
    ranks: Mapping[str, int] | int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    key: str = "base_model.model.{path}.lora_{factor}.weight",
) -> dict[str, torch.Tensor]:
    """Random A [r, in] and B [out, r] for every linear whose last name is a target."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for linear in base.linears:
        if linear.path.rpartition(".")[2] not in targets:
            continue
        rank = ranks if isinstance(ranks, int) else ranks.get(linear.path, 4)
        for factor, shape in (
            ("A", (rank, linear.in_features)),
            ("B", (linear.out_features, rank)),
        ):
            name = key.format(path=linear.path, factor=factor)
            tensors[name] = (torch.randn(shape, generator=random) * 0.1).to(dtype)
    return tensors


def make_raw(
    config: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor] | None = None
) -> RawAdapter:
    """The two files as bytes; without arguments a good adapter of rank 4 for BASE."""
    return RawAdapter(
        json.dumps(make_config() if config is None else config).encode(),
        save(make_tensors() if tensors is None else tensors),
        "test",
    )


def read(
    raw: RawAdapter,
    base: BaseSpec = BASE,
    *,
    dtype: torch.dtype = torch.float32,
    limits: Limits | None = None,
) -> ParsedAdapter:
    return read_adapter(raw, base, dtype=dtype, limits=limits)


def make_parsed(
    *, seed: int = 0, rank: int = 4, dtype: torch.dtype = torch.float32
) -> ParsedAdapter:
    """A good adapter; another seed or rank is another version."""
    return read(make_raw(make_config(r=rank), make_tensors(ranks=rank, seed=seed)), dtype=dtype)


def write_files(directory: Path, raw: RawAdapter | None = None) -> Path:
    """The two files in a new directory."""
    raw = make_raw() if raw is None else raw
    directory.mkdir(parents=True)
    (directory / CONFIG_FILE).write_bytes(raw.config)
    (directory / WEIGHTS_FILE).write_bytes(raw.weights)
    return directory
