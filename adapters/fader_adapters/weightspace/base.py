"""A model on disk as its linears: which there are, where they are stored, each one densely.

Builds transformers' model without memory to learn its shape; never loads it.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from fader_adapters.architecture import auto_class
from fader_adapters.describe import describe, kept_plain, make_plain, to_be_quantised
from fader_adapters.errors import (
    AdapterInvalid,
    BaseUnsupported,
    CheckpointInvalid,
    SourceNotFound,
    first_line,
)
from fader_adapters.kernels import nf4
from fader_adapters.spec import BaseSpec, LinearSpec
from fader_adapters.stacks import absmax_of
from fader_adapters.strict_json import load_object
from fader_adapters.weightspace import quantised
from fader_adapters.weightspace.coded import Decoded
from fader_adapters.weightspace.methods import READ, method_of
from fader_adapters.weightspace.stored_experts import StoredRows, read_packed, stored_rows
from fader_adapters.weightspace.tensors import Checkpoint

MODEL_CONFIG = "config.json"
_BESIDE = tuple(f".weight.{part}" for part in quantised.COMPONENTS)
"""Ends of the keys of what lies beside a packed weight."""
PANEL_ROWS = 256


@dataclass(frozen=True)
class Base:
    """A model directory. Made by `open_base`."""

    checkpoint: Checkpoint
    spec: BaseSpec
    config: dict[str, Any]
    """config.json, without a quantization_config where codes are decoded."""
    names: dict[str, str]
    """The model's own name of a tensor → its key in the files; what is stored fused is not here."""
    quantisable: frozenset[str]
    """Paths of the linears that bitsandbytes quantises."""
    stacks: dict[str, tuple[StoredRows, ...]]
    """Experts by the path of their stack, in its order."""
    kept_plain: list[str] | None = None
    """What its configuration names as left alone; None: its own choice."""

    @property
    def directory(self) -> Path:
        return self.checkpoint.directory

    @property
    def in_nf4(self) -> bool:
        """Whether the files hold an NF4 model."""
        return "quantization_config" in self.config

    @property
    def inside(self) -> tuple[LinearSpec, ...]:
        """The linears, without the output head and the embedding."""
        return tuple(linear for linear in self.spec.linears if linear.inside)

    def keys(self, linear: LinearSpec) -> tuple[str, ...]:
        """Where a linear's weight is stored. Raises CheckpointInvalid."""
        if linear.role != "experts":
            return (self.key(linear),)
        return tuple(rows.key for rows in self.experts(linear))

    def experts(self, linear: LinearSpec) -> tuple[StoredRows, ...]:
        """Where the rows of a stack of experts are stored. Raises CheckpointInvalid."""
        return self.stacks.get(linear.path) or self._missing(linear)

    def key(self, linear: LinearSpec) -> str:
        """The key of a linear's weight; a tied head's is the table's. Raises CheckpointInvalid."""
        if linear.role == "head" and self.spec.tied:
            linear = next(item for item in self.spec.linears if item.role == "embedding")
        return self.names.get(f"{linear.path}.weight") or self._missing(linear)

    def _missing(self, linear: LinearSpec) -> NoReturn:
        raise CheckpointInvalid(
            f"{self.directory}: no tensor for {linear.path!r}: the checkpoint is incomplete, "
            "or stores it fused with others; save it anew with transformers"
        )

    def is_packed(self, key: str) -> bool:
        """Whether the weight under `key` is in NF4. Raises BaseUnsupported for FP4."""
        quantised.refuse_others(key, self.checkpoint.tensors)
        return f"{key}.{quantised.STATE}" in self.checkpoint.tensors

    def holds_packed(self, key: str) -> bool:
        """Whether what is stored under `key` is a whole stack of experts in NF4."""
        return absmax_of(key) in self.checkpoint.tensors

    def packed(self, key: str) -> quantised.Packed:
        """The NF4 weight under `key`. Raises CheckpointInvalid."""
        parts = {
            name: self.checkpoint.read(f"{key}.{name}")
            for name in quantised.COMPONENTS
            if f"{key}.{name}" in self.checkpoint.tensors
        }
        return quantised.load(self.checkpoint.read(key), parts, key=key)

    def stored(self, linear: LinearSpec) -> torch.Tensor | quantised.Packed:
        """W [out, in] as it is stored: NF4, or dense in the file's dtype (a view for Conv1D).

        Raises CheckpointInvalid, BaseUnsupported.
        """
        key, shape = self.key(linear), (linear.out_features, linear.in_features)
        if self.is_packed(key):
            packed = self.packed(key)
            found = (packed.weight.out_features, packed.weight.in_features)
            if found != shape:
                raise CheckpointInvalid(f"{key!r} has shape {found}, the model's is {shape}")
            return packed
        weight = self.checkpoint.read(key)
        weight = weight.T if linear.conv1d else weight
        if tuple(weight.shape) != shape or not weight.is_floating_point():
            raise CheckpointInvalid(
                f"{key!r} is {weight.dtype} of shape {tuple(weight.shape)} as [out, in], "
                f"the model's is {shape}"
            )
        return weight

    def dense(self, linear: LinearSpec) -> torch.Tensor:
        """W [out, in] in fp32, private. Raises as `stored`."""
        return densely(self.stored(linear))

    def panels(self, linear: int) -> Iterator[torch.Tensor]:
        """W in fp32, a few rows at a time; see BaseWeights. Raises as `stored`."""
        if self.spec.linears[linear].role == "experts":
            yield from self._expert_panels(self.spec.linears[linear])
            return
        stored = self.stored(self.spec.linears[linear])
        rows = stored.weight.out_features if isinstance(stored, quantised.Packed) else len(stored)
        for start in range(0, rows, PANEL_ROWS):
            stop = min(rows, start + PANEL_ROWS)
            if isinstance(stored, quantised.Packed):
                yield nf4.dense(stored.weight.rows(start, stop), torch.float32)
            else:
                yield stored[start:stop].to(torch.float32)

    def _expert_panels(self, linear: LinearSpec) -> Iterator[torch.Tensor]:
        for part in self.experts(linear):
            for _, weight in self.matrices(linear, part):
                for rows in weight.split(PANEL_ROWS):
                    yield rows.to(torch.float32)

    def matrices(
        self, linear: LinearSpec, part: StoredRows
    ) -> Iterator[tuple[StoredRows, torch.Tensor]]:
        """What is stored under one key of a stack, as rows of each expert [rows, in]: views of one
        tensor in the file's dtype, or in fp32 what is packed. Raises CheckpointInvalid."""
        if self.holds_packed(part.key):
            stack = read_packed(linear, part.key, self.checkpoint)
            for expert in range(linear.experts):
                yield replace(part, expert=expert), nf4.dense(stack.matrix(expert), torch.float32)
            return
        if self.is_packed(part.key):
            yield part, nf4.dense(self.packed(part.key).weight, torch.float32)
            return
        stored = self.checkpoint.read(part.key)
        if part.expert is not None:
            yield part, stored
            return
        for expert, weight in enumerate(stored.mT if linear.conv1d else stored):
            yield replace(part, expert=expert), weight


def densely(stored: torch.Tensor | quantised.Packed) -> torch.Tensor:
    """[out, in] in fp32, contiguous."""
    if isinstance(stored, quantised.Packed):
        return nf4.dense(stored.weight, torch.float32)
    return stored.to(torch.float32).contiguous()


def open_base(directory: Path) -> Base:
    """Read a model's configuration and headers.

    Raises SourceNotFound, CheckpointInvalid, BaseUnsupported.
    """
    checkpoint, config = _files(directory)
    model = _skeleton(directory)
    spec = describe(model, name=str(directory))
    kept = kept_plain(model)
    names, stacks = _names(model, spec, checkpoint)
    return Base(checkpoint, spec, config, names, _quantisable(model, kept), stacks, kept)


def _files(directory: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """The tensors, decoded where they are another method's codes, and the config that says so no
    more."""
    files, config = Checkpoint(directory), _config(directory)
    facts = config.get("quantization_config")
    if facts is None or (
        isinstance(facts, dict) and facts.get("load_in_4bit") and "bnb_4bit_quant_type" in facts
    ):
        return files, config
    try:
        method = method_of(facts if isinstance(facts, dict) else {})
    except BaseUnsupported as error:
        raise BaseUnsupported(
            f"{directory}: quantised with {error}; expected an unquantised checkpoint, "
            f"bitsandbytes' NF4, {READ}"
        ) from None
    del config["quantization_config"]
    named = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, named, None) if isinstance(named, str) else None
    return Decoded(files, method, dtype), config


def _config(directory: Path) -> dict[str, Any]:
    path = directory / MODEL_CONFIG
    try:
        return load_object(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise SourceNotFound(f"{directory} has no {MODEL_CONFIG}") from None
    except AdapterInvalid as error:
        raise CheckpointInvalid(str(error)) from None


def _skeleton(directory: Path) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            delattr(config, "quantization_config")
        config._attn_implementation = None  # no model runs; the one named need not be installed
        to_be_quantised(config)  # as it is served
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return auto_class(config).from_config(config, trust_remote_code=False)
    except BaseUnsupported as error:
        raise BaseUnsupported(f"{directory}: {error}") from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointInvalid(f"{directory}: {first_line(error)}") from error


def _names(
    model: PreTrainedModel, spec: BaseSpec, checkpoint: Checkpoint
) -> tuple[dict[str, str], dict[str, tuple[StoredRows, ...]]]:
    """As transformers renames the keys of a file while it loads, and puts experts together."""
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    own = model.state_dict()
    names: dict[str, str] = {}
    parts: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(checkpoint.tensors):
        if key.endswith(_BESIDE):
            continue
        name, fused = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
        if fused is not None:
            parts.setdefault(name, []).append((key, fused))
        elif name in own:
            names[name] = key
    stacks: dict[str, tuple[StoredRows, ...]] = {}
    for linear in spec.linears:
        if linear.role != "experts":
            continue
        if linear.path in names:
            rows = (StoredRows(names[linear.path], None, 0, linear.out_features),)
        else:
            sources = parts.get(linear.path, [])
            rows = stored_rows(linear, sources, converters, checkpoint)
        stacks[linear.path] = rows
    return names, stacks


def _quantisable(model: PreTrainedModel, kept: list[str] | None) -> frozenset[str]:
    """Turns the skeleton into bitsandbytes' own to see which linears it takes."""
    from bitsandbytes.nn.modules import Linear4bit

    quantizer = Bnb4BitHfQuantizer(nf4_config(kept), pre_quantized=False)
    make_plain(model)
    quantizer.preprocess_model(cast(Any, model), device_map=None)
    return frozenset(
        path for path, module in model.named_modules() if isinstance(module, Linear4bit)
    )


def nf4_config(kept: list[str] | None) -> BitsAndBytesConfig:
    """NF4 with double quantisation, as `fader quantize` writes it; `kept`: see `kept_plain`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=kept,
    )
