"""The files of a checkpoint that are not weights: index, configuration, tokenizer."""

import json
import math
from pathlib import Path
from typing import Any

from fader_adapters.dtypes import DTYPES
from fader_adapters.weightspace import disk
from fader_adapters.weightspace.base import MODEL_CONFIG, Base, nf4_config
from fader_adapters.weightspace.plan import Form, Shard
from fader_adapters.weightspace.tensors import INDEX_FILE

_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "chat_template.json",
    "*processor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)


def write(base: Base, out: Path, form: Form, shards: list[Shard], *, untied: bool) -> None:
    """Everything but the shards, config.json last: without it nothing loads the directory."""
    if len(shards) > 1:
        disk.write_json(out / INDEX_FILE, _index(out, shards))
    for pattern in _COPIED:
        for file in sorted(base.directory.glob(pattern)):
            if file.is_file():
                target = out / file.relative_to(base.directory)
                target.parent.mkdir(exist_ok=True)
                disk.write_bytes(target, file.read_bytes())
    config = _config(base, form)
    disk.write_json(out / MODEL_CONFIG, _untie(config) if untied else config)


def _index(out: Path, shards: list[Shard]) -> dict[str, Any]:
    total = 0
    for shard in shards:
        with (out / shard.name).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__")
        total += sum(
            math.prod(field["shape"]) * DTYPES[field["dtype"]].itemsize for field in header.values()
        )
    placed = {name: shard.name for shard in shards for name in shard.names}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}


def _config(base: Base, form: Form) -> dict[str, Any]:
    config = dict(base.config)
    if form == "bf16":
        config.pop("quantization_config", None)
        if "torch_dtype" not in config:
            config.setdefault("dtype", "bfloat16")
        return _in_bf16(config)
    if not base.in_nf4:
        config["quantization_config"] = nf4_config(base.kept_plain).to_dict()
    return config


def _untie(config: dict[str, Any]) -> dict[str, Any]:
    """The same for a head with a table of its own, also in the parts of a composite model."""
    changed = {
        key: _untie(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
    }
    return changed | {"tie_word_embeddings": False}


def _in_bf16(config: dict[str, Any]) -> dict[str, Any]:
    """The same with bf16 wherever a dtype stands, also in the parts of a composite model."""
    changed = {
        key: _in_bf16(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
    }
    named = [key for key in ("dtype", "torch_dtype") if key in config]
    return changed | dict.fromkeys(named, "bfloat16")
