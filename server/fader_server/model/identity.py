"""What a base is: a sha256 over every value that was read and the config that gives it a meaning.

Hashes on threads of its own while loading goes on. Knows tensors and configs, no files.
"""

import hashlib
import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Params4bit
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from fader_adapters.spec import Digest

CHUNK_BYTES = 16 << 20
"""Hashed in one go; the chunks of a tensor may be hashed side by side."""
MOST_CHUNKS = 8
"""Read and not yet hashed, so that weights leave memory about as soon as they would anyway."""
THREADS = 2
_NOT_CONTENT = frozenset(
    ("transformers_version", "quantization_config", "dtype", "torch_dtype", "architectures")
)
"""Entries of a config that say how it was stored, as those do that begin with an underscore."""


class Identity:
    """Collects the tensors of one base. Same values, same digest: NF4 made while loading or read.

    `add` from one thread; the tensors must not change until `digest` has returned.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, "fader-identity")
        self._room = threading.Semaphore(MOST_CHUNKS)
        self._parts: dict[str, list[Future[str]]] = {}

    def add(self, path: str, tensor: torch.Tensor) -> None:
        """Any dtype, shape and device; waits while too much is not hashed yet."""
        head = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
        parts = self._parts[path] = [self._submit(head)]
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        parts += [self._submit(chunk) for chunk in data.split(CHUNK_BYTES)]

    def add_linear(self, path: str, module: nn.Module) -> None:
        """A linear's NF4 weight as bitsandbytes stores it; nothing for plain ones."""
        weight = module.weight
        if not isinstance(weight, Params4bit) or weight.quant_state is None:
            return
        state = weight.quant_state
        self.add(path, weight.data)
        self.add(f"{path} absmax", state.absmax)
        if state.nested:
            self.add(f"{path} nested absmax", state.state2.absmax)
            self.add(f"{path} nested offset", cast("torch.Tensor", state.offset))

    def add_rest(self, model: PreTrainedModel) -> None:
        """Every parameter that is not NF4, every buffer, and the config."""
        for path, parameter in model.named_parameters():
            if not isinstance(parameter, Params4bit):
                self.add(path, parameter.data)
        for path, buffer in model.named_buffers():
            self.add(f"{path} buffer", buffer)
        self._parts["config"] = [self._submit(_facts(model.config))]

    def digest(self) -> Digest:
        """Of all that was added, in whatever order. The last call."""
        state = hashlib.sha256(b"fader-base-1")
        with self._pool:
            for path in sorted(self._parts):
                state.update(f"\0{path}".encode())
                for part in self._parts[path]:
                    state.update(bytes.fromhex(part.result()))
        return Digest(state.hexdigest())

    def _submit(self, data: torch.Tensor | bytes) -> Future[str]:
        self._room.acquire()
        return self._pool.submit(self._hash, data)

    def _hash(self, data: torch.Tensor | bytes) -> str:
        try:
            whole = data if isinstance(data, bytes) else memoryview(data.cpu().numpy())
            return hashlib.sha256(whole).hexdigest()
        finally:
            self._room.release()


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
