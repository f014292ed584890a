"""Adapters as MLX-LM leaves them, written by hand: its arguments, its names, its metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from fader_adapters.source import CONFIG_FILE
from tests.adapters.peft_files import BASE, TARGETS

MLX_WEIGHTS_FILE = "adapters.safetensors"
RANK, SCALE = 4, 2.5


def make_mlx_config(**changes: Any) -> dict[str, Any]:
    """All arguments of a run, with changes; a change to `...` removes the key."""
    config = {
        "adapter_path": "adapters",
        "batch_size": 4,
        "clear_cache_threshold": 0,
        "config": None,
        "data": "mlx-community/WikiSQL",
        "fine_tune_type": "lora",
        "grad_accumulation_steps": 1,
        "grad_checkpoint": False,
        "iters": 1000,
        "learning_rate": 1e-05,
        "lora_parameters": {"rank": RANK, "dropout": 0.0, "scale": SCALE},
        "lr_schedule": None,
        "mask_prompt": False,
        "max_seq_length": 2048,
        "model": "tiny/base",
        "num_layers": 16,
        "optimizer": "adam",
        "optimizer_config": {"adam": {}, "adamw": {}},
        "project_name": None,
        "report_to": None,
        "resume_adapter_file": None,
        "save_every": 100,
        "seed": 0,
        "steps_per_eval": 200,
        "steps_per_report": 10,
        "test": False,
        "test_batches": 500,
        "train": True,
        "trust_remote_code": False,
        "val_batches": 25,
    }
    config.update(changes)
    return {key: value for key, value in config.items() if value is not ...}


def make_mlx_tensors(
    *, dora: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, torch.Tensor]:
    """lora_a [in, rank] and lora_b [rank, out] of every linear of BASE's layers, m [out] too."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for linear in BASE.linears:
        if linear.path.rpartition(".")[2] not in TARGETS:
            continue
        shapes = {"lora_a": (linear.in_features, RANK), "lora_b": (RANK, linear.out_features)}
        for role, shape in shapes.items():
            tensors[f"{linear.path}.{role}"] = torch.randn(shape, generator=random) * 0.1
        if dora:
            tensors[f"{linear.path}.m"] = torch.rand(linear.out_features, generator=random) + 0.5
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def without_metadata(weights: bytes) -> bytes:
    """The same file with `null` where others have none: as MLX writes it."""
    size = int.from_bytes(weights[:8], "little")
    header = json.dumps({"__metadata__": None, **json.loads(weights[8 : 8 + size])}).encode()
    return len(header).to_bytes(8, "little") + header + weights[8 + size :]


def mlx_files(
    config: Mapping[str, Any] | None = None, tensors: dict[str, torch.Tensor] | None = None
) -> tuple[bytes, bytes]:
    """Config and weights; without arguments a good adapter of BASE."""
    weights = save(make_mlx_tensors() if tensors is None else tensors)
    return json.dumps(config or make_mlx_config()).encode(), without_metadata(weights)


def write_mlx(directory: Path, files: tuple[bytes, bytes] | None = None) -> Path:
    """A folder of MLX-LM's, with a checkpoint of the run beside."""
    config, weights = files or mlx_files()
    directory.mkdir(parents=True)
    (directory / CONFIG_FILE).write_bytes(config)
    (directory / MLX_WEIGHTS_FILE).write_bytes(weights)
    (directory / f"0000100_{MLX_WEIGHTS_FILE}").write_bytes(b"not looked at")
    return directory
