"""Where transformers takes a base's values from: the files as they are, or values by their names.

Knows transformers' loading; knows nothing of what values become.
"""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from fader_adapters.architecture import auto_class, model_class
from fader_adapters.weightspace.coded import Decoded
from fader_adapters.weightspace.methods import method_of
from fader_adapters.weightspace.tensors import Checkpoint

_NO_ADAPTER = {"subfolder": ".none"}
"""Where transformers looks for an adapter that it would put into the model it reads."""


@dataclass(frozen=True, slots=True)
class Unread:
    """A weight in codes as transformers takes it: by a slice, which reads it."""

    checkpoint: Decoded
    key: str

    def __getitem__(self, _: object) -> torch.Tensor:
        return self.checkpoint.read(self.key)


def unread(checkpoint: Checkpoint, *, without: Collection[str] = ()) -> dict[str, Any]:
    """The tensors of a checkpoint by their keys, none of them read yet: those that lie in its files
    as safetensors hands them out."""
    opened = {file: safe_open(file, framework="pt") for file in checkpoint.files}

    def one(key: str, file: Path) -> Any:  # noqa: ANN401 - safetensors'
        if isinstance(checkpoint, Decoded) and key in checkpoint.coded:
            return Unread(checkpoint, key)
        return opened[file].get_slice(key)

    tensors = checkpoint.tensors
    return {key: one(key, item.file) for key, item in tensors.items() if key not in without}


@dataclass(frozen=True, slots=True)
class Values:
    """What a model of `source` is made of."""

    source: str
    by_name: Mapping[str, Any] | None = None
    """Values, or what reads them, by the names of a file; None: those of the files."""
    dtype: torch.dtype | Literal["auto"] = "auto"
    told: str = ""
    """How they were published, where that is another method's codes."""

    def load(
        self,
        config: PretrainedConfig,
        **given: Any,  # noqa: ANN401 - transformers' own
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model, and what transformers tells of keys that it missed or did not expect."""
        # by its own class where there is no file to read, which the other looks at
        kind: Any = auto_class(config) if self.by_name is None else model_class(config)
        read = kind.from_pretrained(
            self.source if self.by_name is None else None,
            state_dict=self.by_name,
            output_loading_info=True,
            config=config,
            dtype=self.dtype,
            trust_remote_code=False,
            use_safetensors=True,
            adapter_kwargs=_NO_ADAPTER,
            **given,
        )
        model, told = cast("tuple[PreTrainedModel, dict[str, Any]]", read)
        if self.by_name is not None and model.can_generate():
            with suppress(OSError):  # a base need not have one
                model.generation_config = GenerationConfig.from_pretrained(self.source)
        return model, told


def decoded(source: str, folder: Path, config: PretrainedConfig) -> Values:
    """The values of a base that `folder` holds in the codes of another method than bitsandbytes',
    one decoded when it is asked for. `config` says no more that it is quantised.

    Raises BaseUnsupported, CheckpointInvalid.
    """
    loose: Any = config  # which declares neither of the two
    checkpoint = Decoded(Checkpoint(folder), method_of(loose.quantization_config), loose.dtype)
    del loose.quantization_config
    plain = sorted(
        key
        for key, item in checkpoint.tensors.items()
        if key not in checkpoint.coded and len(item.shape) > 1 and not key.endswith("bias")
    )
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    told = (
        f"published in {checkpoint.method.told}: {len(checkpoint.coded)} weights are dequantised "
        f"to {dtype}, and quantised anew where they are held in NF4, a second rounding"
    )
    if plain:
        first = ", ".join(plain[:3]) + (" …" if len(plain) > 3 else "")
        told += f"; {len(plain)} other matrices were published plainly: {first}"
    return Values(source, unread(checkpoint), checkpoint.dtype, told)
