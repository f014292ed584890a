"""What a base is: a sha256 over every value that was read and the config that gives it a meaning.

Knows tensors and configs, no files.
"""

import hashlib
import json
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Params4bit
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from fader_adapters.describe import linears
from fader_adapters.spec import Digest

CHUNK_BYTES = 16 << 20
"""Hashed in one go; the chunks of a tensor may be hashed side by side."""
MOST_THREADS = 8
_NOT_CONTENT = frozenset(
    ("transformers_version", "quantization_config", "dtype", "torch_dtype", "architectures")
)
"""Entries of a config that say how it was stored, as those do that begin with an underscore."""


class Identity:
    """Hashes one base. Same values, same digest: NF4 made while loading or read from a file."""

    def __init__(self, model: PreTrainedModel) -> None:
        """`model` as it was read. Its NF4 weights are hashed when this returns and may go then;
        the rest is hashed until `digest` returns and must not change before.
        """
        self._pool = ThreadPoolExecutor(
            min(MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="fader-identity"
        )
        self._parts: dict[str, list[Future[str]]] = {}
        for path, module in linears(model):
            self._add_linear(path, module)
        # At once, with all threads: beside the repacking they would only be in each other's way.
        wait([part for parts in self._parts.values() for part in parts])
        self._add_rest(model)

    def digest(self) -> Digest:
        """Of every value, and the config. The last call."""
        state = hashlib.sha256(b"fader-base-1")
        with self._pool:
            for path in sorted(self._parts):
                state.update(f"\0{path}".encode())
                for part in self._parts[path]:
                    state.update(bytes.fromhex(part.result()))
        return Digest(state.hexdigest())

    def _add(self, path: str, tensor: torch.Tensor) -> None:
        """Any dtype, shape and device."""
        head = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
        parts = self._parts[path] = [self._submit(head)]
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        parts += [self._submit(chunk) for chunk in data.split(CHUNK_BYTES)]

    def _add_linear(self, path: str, module: nn.Module) -> None:
        """A linear's NF4 weight as bitsandbytes stores it; nothing for plain ones."""
        weight = module.weight
        if not isinstance(weight, Params4bit) or weight.quant_state is None:
            return
        state = weight.quant_state
        self._add(path, weight.data)
        self._add(f"{path} absmax", state.absmax)
        if state.nested:
            assert state.state2 is not None
            self._add(f"{path} nested absmax", state.state2.absmax)
            self._add(f"{path} nested offset", cast("torch.Tensor", state.offset))

    def _add_rest(self, model: PreTrainedModel) -> None:
        """Every parameter that is not NF4, every buffer, and the config."""
        for path, parameter in model.named_parameters():
            if not isinstance(parameter, Params4bit):
                self._add(path, parameter.data)
        for path, buffer in model.named_buffers():
            self._add(f"{path} buffer", buffer)
        self._parts["config"] = [self._submit(_facts(model.config))]

    def _submit(self, data: torch.Tensor | bytes) -> Future[str]:
        return self._pool.submit(_hash, data)


def _hash(data: torch.Tensor | bytes) -> str:
    whole = data if isinstance(data, bytes) else memoryview(cast(Any, data.cpu().numpy()))
    return hashlib.sha256(whole).hexdigest()


def _facts(config: PretrainedConfig) -> bytes:
    return json.dumps(_content(config.to_dict()), sort_keys=True, default=str).encode()


def _content(value: object) -> Any:  # noqa: ANN401 - JSON
    if not isinstance(value, dict):
        return value
    return {
        str(key): _content(item)
        for key, item in value.items()
        if not str(key).startswith("_") and key not in _NOT_CONTENT
    }
