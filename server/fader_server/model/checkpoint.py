"""A checkpoint on disk as bitsandbytes' NF4 model; refuses what cannot be.

Knows transformers' loading and files; knows nothing of Fader's linears.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from fader_adapters.architecture import auto_class, model_class, uses_interface
from fader_adapters.describe import kept_plain_of
from fader_adapters.errors import AdapterError, BaseUnsupported, first_line
from fader_adapters.hub import hub_transport
from fader_adapters.kernels import native
from fader_adapters.stacks import experts
from fader_adapters.weightspace.methods import READ, method_of
from fader_server.errors import ConfigInvalid, ModelUnsupported
from fader_server.model.by_expert import packed_by_expert
from fader_server.model.decoded import settle
from fader_server.model.leftovers import (
    QUANT_FILE,
    codes_in,
    other_method,
    passed_over,
    unread_codes,
)
from fader_server.model.quantizer import Nf4Config, packed_stacks, read_here
from fader_server.model.rotary import unknown_rope
from fader_server.model.values import Values, decoded

log = logging.getLogger(__name__)

_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "LICENSE*")
"""What of a repository on the Hub is a model."""
_TWICE = ("consolidated*", "*/*.safetensors")
"""The same weights in the form of their maker."""

_OTHER_ATTENTION = (
    "attention_chunk_size",
    "use_bidirectional_attention",
    "add_cross_attention",
    "index_topk",
    "index_topk_blocks",
)
"""Settings of configs under which a token sees other keys than those of a causal window."""

_BY_BITSANDBYTES = "bitsandbytes"
_READS = f"Fader reads unquantised checkpoints, bitsandbytes' NF4, {READ}"


def read_config(source: str) -> PretrainedConfig:
    """The base's config, refused when it needs code of its own or is not a causal decoder.

    Raises ConfigInvalid when there is no model, ModelUnsupported.
    """
    check_folder(source)
    _check_reachable(source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise ModelUnsupported(
                f"{source}: needs remote code, which Fader never runs; "
                "use a model whose architecture is part of transformers"
            ) from error
        if isinstance(error, OSError):
            raise ConfigInvalid(f"no model at {source!r}: {first_line(error)}") from error
        raise ModelUnsupported(f"{source}: {first_line(error)}") from error
    try:
        auto_class(config)
    except BaseUnsupported as error:
        raise ModelUnsupported(f"{source}: {error}") from error
    _check_quantization(source, config)
    config._attn_implementation = None  # Fader's is set later; the one named need not be installed
    return config


def why_not_packed(config: PretrainedConfig) -> str:
    """What a config says of an attention that is not Fader's over packed rows; empty: nothing."""
    if not uses_interface(config):
        return (
            f"the attention of {model_class(config).__name__} does not go through "
            "transformers' AttentionInterface"
        )
    text = config.get_text_config(decoder=True)
    for name in _OTHER_ATTENTION:
        if getattr(text, name, None) not in (None, False, 0, "vision"):
            return f"{name} is set, an attention Fader does not have"
    return ""


def check_folder(source: str) -> None:
    """What a path says at a glance, before it is taken for a Hub id. Raises ConfigInvalid."""
    folder = Path(source)
    if not folder.is_dir():
        no_id = source.count("/") > 1 or source.endswith("/") or "\\" in source
        if no_id or source.startswith((".", "/", "~")):
            raise ConfigInvalid(
                f"no model at {source!r}: no such folder; give a folder or a Hub id"
            )
    elif not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ConfigInvalid(
                f"{source} holds an adapter, expected a base; name the base it was trained on "
                "here, and this folder as an adapter of it"
            )
        raise ConfigInvalid(f"{source} has no config.json; give the folder of a transformers model")


def _check_reachable(source: str) -> None:
    """Ask the Hub once for a base that is not on this machine: transformers asks again and again
    before it says that nobody answers. Raises ConfigInvalid."""
    if Path(source).is_dir() or constants.HF_HUB_OFFLINE:
        return
    try:
        if try_to_load_from_cache(source, CONFIG_NAME) is None:
            get_hf_file_metadata(hf_hub_url(source, CONFIG_NAME))
    except hub_transport().TransportError as error:
        raise ConfigInvalid(
            f"no model at {source!r}: no such folder, and the Hub does not answer "
            f"({first_line(error)})"
        ) from error
    except (OSError, ValueError):
        return  # an answer, or no name for the Hub: transformers has the words for it


def local_copy(source: str, files: Iterable[str] = _FILES) -> Path:
    """The folder of a base's files, fetched when `source` is a Hub id. Raises ConfigInvalid."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(
            snapshot_download(source, allow_patterns=list(files), ignore_patterns=[*_TWICE])
        )
    except (OSError, ValueError) as error:
        raise ConfigInvalid(f"no model at {source!r}: {first_line(error)}") from error


def _check_quantization(source: str, config: PretrainedConfig) -> None:
    given = getattr(config, "quantization_config", None)
    if given is None:
        file = cached_file(
            source,
            QUANT_FILE,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if method := other_method(config, file):
            raise ModelUnsupported(f"{source}: quantised with {method}; {_READS}")
        return
    facts: dict[str, Any] = given if isinstance(given, dict) else given.to_dict()
    if facts.get("quant_method") != _BY_BITSANDBYTES:
        try:
            method_of(facts)
        except BaseUnsupported as error:
            raise ModelUnsupported(f"{source}: quantised with {error}; {_READS}") from None
        return
    if not facts.get("load_in_4bit"):
        eight = ", in 8-bit" if facts.get("load_in_8bit") else ""
        raise ModelUnsupported(f"{source}: quantised with bitsandbytes{eight}; {_READS}")
    if facts.get("bnb_4bit_quant_type") != "nf4":
        raise ModelUnsupported(f"{source}: 4-bit type {facts.get('bnb_4bit_quant_type')}, not nf4")


def of_bitsandbytes(config: PretrainedConfig) -> bool:
    """Whether a config that `read_config` took is of a checkpoint in NF4."""
    facts: Any = getattr(config, "quantization_config", None)
    return facts is not None and facts.get("quant_method") == _BY_BITSANDBYTES


def values_of(source: str, config: PretrainedConfig) -> Values:
    """Of a base that is not in NF4; `config` says no more that it is quantised. Raises
    ConfigInvalid, ModelUnsupported."""
    if getattr(config, "quantization_config", None) is None:
        _check_plain(source)
        return Values(source)
    try:
        return decoded(source, local_copy(source), config)
    except AdapterError as error:
        raise ModelUnsupported(f"{source}: {error}") from error


def _check_plain(source: str) -> None:
    """Refuse files, as far as they are here, that hold codes where a config names no method."""
    found = source if Path(source).is_dir() else try_to_load_from_cache(source, CONFIG_NAME)
    folder = Path(found) if isinstance(found, str) else None
    if folder is not None and (told := codes_in(folder if folder.is_dir() else folder.parent)):
        raise ModelUnsupported(
            f"{source}: {told}, quantised by a method that its config does not name; {_READS}"
        )


def read_nf4(
    source: str,
    config: PretrainedConfig,
    *,
    device: torch.device,
    attn_implementation: str | None,
    quantize_experts: bool = False,
) -> PreTrainedModel:
    """The model with bitsandbytes' NF4 linears: read as they are, or quantised while loading.

    quantize_experts: mixtures' experts too, where they are not already.
    """
    ready = of_bitsandbytes(config)
    if not ready:
        values = values_of(source, config)
    else:
        facts: dict[str, Any] = config.quantization_config
        values = Values(source, packed_by_expert(local_copy(source)))
        facts = facts if values.by_name is None else {**facts, "experts_in_nf4": True}
        config.quantization_config = read_here(facts)
        if quantize_experts and not facts.get("experts_in_nf4"):
            raise ConfigInvalid(
                f"{source} is quantised already, but not its experts; quantise the original with "
                "`fader quantize --experts`, or serve this one without --quantize-experts"
            )
    nf4 = Nf4Config(
        native_kernel=device.type == "cpu" and native.available(),
        experts_in_nf4=quantize_experts,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    try:
        with quiet_libraries():
            nf4.llm_int8_skip_modules = None if ready else kept_plain_of(config)
            model, told = values.load(
                config,
                device_map={"": str(device)},
                attn_implementation=attn_implementation,
                quantization_config=None if ready else nf4,
            )
    except torch.OutOfMemoryError as error:
        raise ConfigInvalid(
            f"{source}: the base does not fit on {device}: {first_line(error)} "
            "Use a smaller base, a device with more memory or --device cpu"
        ) from error
    except Exception as error:  # whatever a checkpoint on disk can cause ends as one line
        why = unknown_rope(config) if isinstance(error, KeyError) else ""
        raise ModelUnsupported(f"{source}: cannot be loaded: {why or first_line(error)}") from error
    if not ready and values.by_name is None and not Path(source).is_dir():
        _check_plain(source)  # what was fetched only now
    if key := unread_codes(model, told["unexpected_keys"]):
        raise ModelUnsupported(
            f"{source}: it holds {key}, of a quantisation that its config does not name, and which "
            f"the weights beside it mean nothing without; {_READS}"
        )
    missing = sorted({*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])})
    if missing:  # transformers would go on with random numbers in their place
        raise ModelUnsupported(
            f"{source}: {len(missing)} weights are missing or of another shape, first {missing[0]}"
        )
    if dropped := passed_over(model, told["unexpected_keys"]):
        log.warning(
            "%s: %d tensors of its files have no place in %s and are left out: %s",
            source,
            len(dropped),
            type(model).__name__,
            ", ".join(dropped[:3]) + (" …" if len(dropped) > 3 else ""),
        )
    packed = any(True for _ in packed_stacks(model))
    if values.told:
        stay = any(True for _ in experts(model)) and not packed
        kept = "; experts stay as they are dequantised (--quantize-experts: NF4)" if stay else ""
        log.warning("%s: %s%s", source, values.told, kept)
    if quantize_experts and not packed:
        log.warning("%s has no experts that could be held in NF4", source)
    model.eval()
    try:
        settle(model)
    except BaseUnsupported as error:
        raise ModelUnsupported(f"{source}: {error}") from error
    return model


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers' advice on training out of the server's output; progress bars stay."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
