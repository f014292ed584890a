"""Adapters of MLX-LM as PEFT writes the same delta. Knows both formats; no base, no torch.

What `mlx_lm.lora` leaves: adapter_config.json, all arguments of its run, of which its loader reads
fine_tune_type ("lora" where it is missing), num_layers and lora_parameters {rank, scale, dropout,
keys}; and adapters.safetensors with, of every adapted linear,

    lora_a [in, rank], lora_b [rank, out]     y = W·x + scale·(x·lora_a)·lora_b + bias
    m [out], of "dora" alone                  y = m/‖W + scale·(lora_a·lora_b)ᵀ‖ ∘ (the same) + bias

PEFT's A and B are these transposed, its alpha is scale·rank, its magnitude is m. `keys` are paths
inside a layer or of the whole model; without them every linear of a layer is meant. The last
num_layers layers are adapted, all of them where it is 0 or less. Its loader passes over tensors of
other modules, and leaves a module that has none at the base's; so do we with the latter.
Its models read weights as Hugging Face's files have them, but for those of FOLDED.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fader_adapters.config_keys import shown
from fader_adapters.errors import AdapterInvalid, AdapterMismatch
from fader_adapters.header import ELEMENT_BYTES, TensorInfo, read_header
from fader_adapters.limits import Limits
from fader_adapters.spec import BaseSpec
from fader_adapters.strict_json import load_object

FOLDED = frozenset({"falcon_h1"})
"""Model types whose multipliers MLX-LM folds into the weights it trains on: a delta for those is
another one for the weights as they are."""

MADE_BY_MLX = {"parent_library": "mlx_lm"}
"""The auto_mapping of what was put in PEFT's terms; PEFT says there what class a model was."""

_MARKS = ("fine_tune_type", "lora_parameters")
_READ = frozenset({"fine_tune_type", "lora_parameters", "model", "num_layers"})
_TRAINING = frozenset(
    {
        "adapter_path",
        "batch_size",
        "clear_cache_threshold",
        "config",
        "data",
        "grad_accumulation_steps",
        "grad_checkpoint",
        "iters",
        "learning_rate",
        "lr_schedule",
        "mask_prompt",
        "max_seq_length",
        "optimizer",
        "optimizer_config",
        "project_name",
        "report_to",
        "resume_adapter_file",
        "save_every",
        "seed",
        "steps_per_eval",
        "steps_per_report",
        "test",
        "test_batches",
        "train",
        "trust_remote_code",
        "val_batches",
        "wandb",
    }
)
"""Arguments of a run that are over with it."""
_PARAMETERS = frozenset({"dropout", "keys", "rank", "scale"})

_ROLE = re.compile(r"(?P<path>.+)\.(?P<role>lora_a|lora_b|m)")
_LAYER = re.compile(r"(?:.+?\.|)(?P<layer>\d+)\.(?P<inside>.+)", re.ASCII)
_PEFT_NAMES = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "m": "lora_magnitude_vector",
}
_EMBEDDINGS = frozenset({"embed_in", "embed_tokens", "tok_embeddings", "word_embeddings", "wte"})


def in_peft_terms(config: bytes, weights: bytes, limits: Limits) -> tuple[bytes, bytes]:
    """The two files of an adapter as PEFT would have written them; PEFT's own as they are.

    The same files always give the same bytes. Raises AdapterInvalid for an MLX-LM adapter that is
    malformed or that PEFT's terms do not say exactly, AdapterTooLarge past a limit.
    """
    if len(config) > limits.config_bytes or not any(mark.encode() in config for mark in _MARKS):
        return config, weights
    fields = load_object(config, "adapter_config.json")
    if "peft_type" in fields or not any(mark in fields for mark in _MARKS):
        return config, weights
    dora = _kind(fields)
    rank, scale, keys = _parameters(fields.get("lora_parameters"))
    modules = _modules(read_header(weights, limits))
    _check_selected(modules, keys, _layers(fields.get("num_layers")))
    peft = {
        "auto_mapping": MADE_BY_MLX,
        "base_model_name_or_path": fields.get("model"),
        "bias": "none",
        "lora_alpha": scale * rank,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(modules),
        "task_type": "CAUSAL_LM",
        "use_dora": dora,
    }
    return json.dumps(peft).encode(), _rewritten(weights, modules)


def check_folded(base: BaseSpec) -> None:
    """Whether a delta of MLX-LM's is one for this base's weights. Raises AdapterMismatch."""
    if base.model_type in FOLDED:
        raise AdapterMismatch(
            f"the adapter was trained by MLX-LM, which multiplies the weights of {base.model_type} "
            "by the multipliers of its config: it is another one for the base as it is; train it "
            "with PEFT"
        )


def _kind(fields: Mapping[str, Any]) -> bool:
    """Whether it is DoRA. Raises AdapterInvalid."""
    for key, value in fields.items():
        if key not in _READ | _TRAINING and value not in (None, False, {}, [], ""):
            raise _unknown(key, value)
    kind = fields.get("fine_tune_type", "lora")
    if kind == "full":
        raise AdapterInvalid(
            "adapter_config.json: fine_tune_type = 'full' are whole weights, no adapter: fuse them "
            "with mlx_lm.fuse and serve the result, or make LoRA of it by `fader extract`"
        )
    if kind not in ("lora", "dora"):
        raise AdapterInvalid(
            f"adapter_config.json: fine_tune_type = {shown(kind)}, expected 'lora' or 'dora'"
        )
    return kind == "dora"


def _parameters(given: Any) -> tuple[int, float, frozenset[str] | None]:  # noqa: ANN401
    """Rank, scale and keys. Raises AdapterInvalid."""
    if not isinstance(given, dict):
        raise AdapterInvalid(
            f"adapter_config.json: lora_parameters = {shown(given)}, expected an object with rank "
            "and scale"
        )
    for key, value in given.items():
        if key == "alpha":
            raise AdapterInvalid(
                "adapter_config.json: lora_parameters.alpha is not read by MLX-LM, or multiplied "
                "scale by alpha/rank in older releases; write what the run multiplied by as scale, "
                "and leave alpha out"
            )
        if key not in _PARAMETERS and value is not None:
            raise _unknown(f"lora_parameters.{key}", value)
    rank, scale, keys = given.get("rank"), given.get("scale"), given.get("keys")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterInvalid(
            f"adapter_config.json: lora_parameters.rank = {shown(rank)}, expected a rank ≥ 1"
        )
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < math.inf:
        raise AdapterInvalid(
            f"adapter_config.json: lora_parameters.scale = {shown(scale)}, expected a number > 0"
        )
    if keys is None:
        return rank, scale, None
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise AdapterInvalid(
            f"adapter_config.json: lora_parameters.keys = {shown(keys)}, expected a list of paths"
        )
    return rank, scale, frozenset(keys)


def _layers(given: Any) -> int:  # noqa: ANN401
    if type(given) is not int:
        raise AdapterInvalid(
            f"adapter_config.json: num_layers = {shown(given)}, expected the number of layers that "
            "are adapted, or -1 for all (older releases called it lora_layers)"
        )
    return given


def _modules(infos: Iterable[TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Tensors by module and role. Raises AdapterInvalid."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for info in infos:
        match = _ROLE.fullmatch(info.name)
        if match is None:
            raise AdapterInvalid(
                f"tensor {info.name[:160]!r} is none of lora_a, lora_b and m, as MLX-LM names them"
            )
        path, role = match["path"], match["role"]
        if ".switch_mlp." in f".{path}." or len(info.shape) > 2:
            raise AdapterInvalid(
                f"tensor {info.name[:160]!r} is of a mixture's experts, which MLX-LM stacks in a "
                "way of its own: leave them out of lora_parameters.keys"
            )
        if path.rpartition(".")[2] in _EMBEDDINGS:
            raise AdapterInvalid(
                f"tensor {info.name[:160]!r} is of an embedding, which is not implemented for "
                "MLX-LM's adapters: leave it out of lora_parameters.keys"
            )
        if len(info.shape) != (1 if role == "m" else 2):
            raise AdapterInvalid(
                f"tensor {info.name[:160]!r} has shape {info.shape}, expected "
                f"{'[out]' if role == 'm' else 'a matrix'}"
            )
        found.setdefault(path, {})[role] = info
    return found


def _check_selected(paths: Iterable[str], keys: frozenset[str] | None, layers: int) -> None:
    """Every module with tensors is one that MLX-LM would adapt. Raises AdapterInvalid."""
    numbers: set[int] = set()
    for path in paths:
        match = _LAYER.fullmatch(path)
        whole = keys is not None and path in keys
        if not whole and (match is None or (keys is not None and match["inside"] not in keys)):
            raise AdapterInvalid(
                f"the file has tensors for {path[:160]!r}, lora_parameters.keys of "
                "adapter_config.json do not name it: MLX-LM would pass over them"
            )
        if match is not None and not whole:
            numbers.add(int(match["layer"]))
    span = max(numbers) - min(numbers) + 1 if numbers else 0
    if 0 < layers < span:
        raise AdapterInvalid(
            f"adapter_config.json: num_layers = {layers}, the file has tensors for {span} layers "
            f"({min(numbers)} to {max(numbers)}): MLX-LM would pass over some; expected {span} or "
            "more, or -1"
        )


def _rewritten(weights: bytes, modules: Mapping[str, Mapping[str, TensorInfo]]) -> bytes:
    """A safetensors buffer with PEFT's names, matrices transposed."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for path, tensors in sorted(modules.items()):
        for role, info in sorted(tensors.items()):
            element = np.dtype(f"u{ELEMENT_BYTES[info.dtype]}")  # bits alone, whatever they mean
            count = (info.end - info.start) // element.itemsize
            values = np.frombuffer(weights, element, count, info.start).reshape(info.shape).T
            at = len(data)
            data += values.tobytes()
            header[f"base_model.model.{path}.{_PEFT_NAMES[role]}"] = {
                "dtype": info.dtype,
                "shape": list(values.shape),
                "data_offsets": [at, len(data)],
            }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(data)


def _unknown(key: str, value: Any) -> AdapterInvalid:  # noqa: ANN401
    return AdapterInvalid(
        f"adapter_config.json: {key[:80]!r} = {shown(value)} is no argument of mlx_lm.lora that is "
        "known here; take it out if it changes nothing once training is over"
    )
