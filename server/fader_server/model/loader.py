"""Loads a base: any decoder-only transformers model, in NF4, its linears replaced by Fader's.

Knows checkpoints and module trees; knows nothing of requests or adapters.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from fader_adapters.errors import BaseUnsupported
from fader_adapters.kernels import native
from fader_adapters.kernels.backend import Backend
from fader_adapters.kernels.cpu import NativeBackend
from fader_adapters.kernels.nf4 import check_width
from fader_adapters.layers import Installed, install
from fader_server.errors import ConfigInvalid, ModelUnsupported
from fader_server.model import attention
from fader_server.model.head import NativeHead
from fader_server.model.kv_cache import LayerShape
from fader_server.model.norm import replace_norms
from fader_server.model.quantizer import use_native_kernel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedBase:
    """A base ready to run: its model, its sites and the shapes its cache needs."""

    model: PreTrainedModel
    installed: Installed
    layers: dict[nn.Module, LayerShape]
    source: str
    dtype: torch.dtype
    device: torch.device
    backend: Backend
    max_positions: int
    vocab_size: int
    eos_ids: frozenset[int]

    @property
    def nbytes(self) -> int:
        """Resident bytes of the base: NF4 weights, embeddings, norms and the output layer."""
        rest = {p.data_ptr(): p.nbytes for p in self.model.parameters()}
        return self.installed.nbytes + sum(rest.values())


def load_base(
    source: str, *, dtype: torch.dtype, device: torch.device, backend: Backend
) -> LoadedBase:
    """Read `source`, a local directory or Hub id, quantising to NF4 unless it already is.

    The checkpoint on disk is never written. Raises ConfigInvalid when nothing is there and
    ModelUnsupported, in one line, when it cannot be served.
    """
    config = read_config(source)
    attention.register()
    model = read_nf4(source, config, device=device, attn_implementation=attention.NAME)
    for parameter in model.parameters():
        if not isinstance(parameter, Params4bit) and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    try:
        installed = install(model, backend, name=source)
    except BaseUnsupported as error:
        raise ModelUnsupported(f"{source}: {error}") from error
    head = model.get_output_embeddings()
    if isinstance(backend, NativeBackend):
        replace_norms(model)
        if isinstance(head, nn.Linear):
            head.weight.data = backend.keep(head.weight.data)
            model.set_output_embeddings(NativeHead(head))
    text = config.get_text_config(decoder=True)
    return LoadedBase(
        model=model,
        installed=installed,
        layers=_probe(model, source),
        source=source,
        dtype=dtype,
        device=device,
        backend=backend,
        max_positions=int(getattr(text, "max_position_embeddings", None) or 2048),
        vocab_size=int(text.vocab_size),
        eos_ids=_eos_ids(source, config),
    )


def read_config(source: str) -> PretrainedConfig:
    """The base's config, refused when it needs code of its own or is not a causal decoder."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise ModelUnsupported(
                f"{source}: needs remote code, which Fader never runs; "
                "use a model whose architecture is part of transformers"
            ) from error
        if isinstance(error, OSError):
            raise ConfigInvalid(f"no model at {source!r}: {_first_line(error)}") from error
        raise ModelUnsupported(f"{source}: {_first_line(error)}") from error
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelUnsupported(
            f"{source}: {config.model_type} is not a decoder-only language model"
        )
    architecture: type[PreTrainedModel] = cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    if not architecture._supports_attention_backend:
        raise ModelUnsupported(
            f"{source}: the attention of {architecture.__name__} does not go through "
            "transformers' AttentionInterface"
        )
    text = config.get_text_config(decoder=True)
    for name in ("attention_chunk_size", "use_bidirectional_attention", "add_cross_attention"):
        if getattr(text, name, None):
            raise ModelUnsupported(f"{source}: {name} is set, an attention Fader does not have")
    _check_quantization(source, config)
    return config


def _check_quantization(source: str, config: PretrainedConfig) -> None:
    given = getattr(config, "quantization_config", None)
    if given is None:
        return
    facts: dict[str, Any] = given if isinstance(given, dict) else given.to_dict()
    if facts.get("quant_method") != "bitsandbytes" or not facts.get("load_in_4bit"):
        raise ModelUnsupported(
            f"{source}: quantised with {facts.get('quant_method')}; "
            "Fader reads bitsandbytes NF4 or unquantised checkpoints"
        )
    if facts.get("bnb_4bit_quant_type") != "nf4":
        raise ModelUnsupported(f"{source}: 4-bit type {facts.get('bnb_4bit_quant_type')}, not nf4")


def read_nf4(
    source: str, config: PretrainedConfig, *, device: torch.device, attn_implementation: str | None
) -> PreTrainedModel:
    """The model with bitsandbytes' NF4 linears: read as they are, or quantised while loading."""
    ready = getattr(config, "quantization_config", None) is not None
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    if not ready and device.type == "cpu" and native.available():
        use_native_kernel(nf4)
    try:
        with quiet_libraries():
            read: Any = AutoModelForCausalLM.from_pretrained(
                source,
                output_loading_info=True,
                config=config,
                dtype="auto",
                device_map={"": str(device)},
                attn_implementation=attn_implementation,
                quantization_config=None if ready else nf4,
                trust_remote_code=False,
                use_safetensors=True,
            )
    except Exception as error:  # whatever a checkpoint on disk can cause ends as one line
        raise ModelUnsupported(f"{source}: cannot be loaded: {_first_line(error)}") from error
    model, told = cast("tuple[PreTrainedModel, dict[str, Any]]", read)
    missing = sorted({*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])})
    if missing:  # transformers would go on with random numbers in their place
        raise ModelUnsupported(
            f"{source}: {len(missing)} weights are missing or of another shape, first {missing[0]}"
        )
    model.eval()
    for path, module in model.named_modules():
        if isinstance(module, Linear4bit):
            # each holds the other: without this a weight would outlive its layer until some
            # collection of garbage, and the base would be in memory twice
            cast(Any, module.weight).module = None
            try:
                check_width(module.in_features)
            except BaseUnsupported as error:
                raise ModelUnsupported(f"{source}: {path}: {error}") from error
    return model


def quantize(source: str, target: Path, *, device: torch.device) -> None:
    """Write `source` as a bitsandbytes NF4 checkpoint that transformers and Fader read.

    Raises ConfigInvalid when the target exists or the source is quantised already.
    """
    config = read_config(source)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigInvalid(f"{source} is quantised already; serve it as it is")
    if target.exists() and any(target.iterdir()):
        raise ConfigInvalid(f"{target} is not empty; name a new directory")
    model = read_nf4(source, config, device=device, attn_implementation=None)
    model.save_pretrained(target)
    try:
        transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(
            target
        )
    except (OSError, ValueError) as error:
        log.warning("no tokenizer was written: %s", _first_line(error))


def _probe(model: PreTrainedModel, source: str) -> dict[nn.Module, LayerShape]:
    """Run a few tokens once: proves that every layer attends through Fader and tells its shape."""
    probe = attention.Probe()
    ids = torch.zeros(1, 4, dtype=torch.int64, device=model.device)
    with torch.inference_mode():
        model(
            input_ids=ids,
            position_ids=torch.arange(4, device=model.device).unsqueeze(0),
            use_cache=False,
            logits_to_keep=torch.tensor([3], device=model.device),
            fader_step=probe,
        )
    expected = model.config.get_text_config(decoder=True).num_hidden_layers
    if len(probe.shapes) != expected:
        raise ModelUnsupported(
            f"{source}: {len(probe.shapes)} of {expected} layers attend through transformers' "
            "AttentionInterface; Fader needs all of them"
        )
    return probe.shapes


def _eos_ids(source: str, config: PretrainedConfig) -> frozenset[int]:
    found: list[Any] = [config.get_text_config(decoder=True).eos_token_id]
    with suppress(OSError):  # a checkpoint without generation_config.json is an ordinary one
        found.append(GenerationConfig.from_pretrained(source).eos_token_id)
    flat = [i for given in found for i in (given if isinstance(given, list) else [given])]
    return frozenset(int(i) for i in flat if i is not None)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers' advice on training out of the server's output; progress bars stay."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
