"""What a checkpoint holds beside the weights its model reads, and what that says of them.

Knows names, dtypes and module trees; loads nothing.
"""

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from fader_adapters.errors import AdapterError
from fader_adapters.weightspace.coded import codes_among
from fader_adapters.weightspace.tensors import Checkpoint

QUANT_FILE = "hf_quant_config.json"
"""Where ModelOpt's exports tell their method, older ones only there."""

_OF_A_METHOD = re.compile(
    r"weight_(\w+_)?scale(_\w+)?|(input|output|act|activation)_(\w+_)?scale(_inv)?|pre_quant_scale"
    r"|weight_(packed|shape|zero_point|g_idx|bitmask)|(input|output|act|activation)_zero_point"
    r"|\w*scale_inv|(\w+_)?scales|(\w+_)?qweight|(\w+_)?qzeros|zeros|g_idx|qdata|_amax|W_q"
    r"|SCB|weight_format|codebooks|absmax|quant_map|nested_absmax|nested_quant_map",
    re.ASCII,
)
"""What methods of quantisation call that which weights are made of, beside codes."""

_OF_A_CACHE = re.compile(r"\.[kv]_proj\.output_(scale|zero_point)$", re.ASCII)
"""Of keys and values in eight bits, which Fader holds otherwise: weights are as they are."""

_NORMAL = re.compile(
    r"(^|\.)(rotary_emb\..*|(original_)?inv_freq|(cos|sin)_cached|position_ids|causal_mask"
    r"|masked_bias|attn\.bias|attention\.bias|embed_positions\.weights)$",
    re.ASCII,
)
"""What older files hold, and models now make by themselves: positions and causal masks."""

_GUESSES = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head|mtp\w*)\.", re.ASCII)
"""What such layers hold that guess the token after the next."""


def other_method(config: PretrainedConfig, quant_file: str | None) -> str:
    """The method of a checkpoint whose config has no quantization_config of its own, and where it
    is told; empty: nowhere. `quant_file`: the path of its QUANT_FILE."""
    inside: Any = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if inside:
        facts = inside if isinstance(inside, dict) else inside.to_dict()
        return f"{facts.get('quant_method')} (as its text_config tells)"
    compressed = getattr(config, "compression_config", None)
    if compressed:
        facts = compressed if isinstance(compressed, dict) else {}
        method = facts.get("quant_method") or "compressed-tensors"
        return f"{method} (as compression_config tells)"
    if quant_file is None:
        return ""
    try:
        algorithm = json.loads(Path(quant_file).read_text())["quantization"]["quant_algo"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # its tensors are looked at all the same
    plain = algorithm in (None, "", "NO_QUANT")  # a cache alone may be quantised
    return "" if plain else f"{algorithm} (as {QUANT_FILE} tells)"


def codes_in(folder: Path) -> str:
    """The first weight that the files hold as codes of a byte, with its dtype; empty: none."""
    try:
        tensors = Checkpoint(folder).tensors
    except (AdapterError, OSError):
        return ""  # transformers says what is wrong
    return codes_among(tensors)


def unread_codes(model: nn.Module, unread: Iterable[str]) -> str:
    """The first of the tensors that a model did not read without which some weight means nothing;
    empty: none."""
    weights = {name for name, weight in model.named_parameters() if weight.dim() > 1}
    return next((key for key in sorted(unread) if _of_codes(key, weights)), "")


def _of_codes(key: str, weights: Collection[str]) -> bool:
    parent, _, name = key.rpartition(".")
    if _OF_A_CACHE.search(key):
        return False
    if _OF_A_METHOD.fullmatch(name) or ".quant_state." in key or "_quantizer." in key:
        return True
    # others may be called so, too, but for one that stands beside a weight
    own = f"{parent}.weight" if name == "scale" else key.removesuffix("_scale")
    return own in weights


def passed_over(model: PreTrainedModel, unread: Iterable[str]) -> list[str]:
    """Those of the tensors that a model did not read which it should have had a place for. Not what
    models make by themselves, nor parts that it leaves out as a whole: towers, guesses ahead."""
    parts: dict[tuple[str, ...], list[str]] = {}
    for key in sorted(unread):
        if not _NORMAL.search(key):
            names = key.split(".")
            parts.setdefault(tuple(names[: _known(model, names) + 1]), []).append(key)
    return [key for part, keys in parts.items() if not _left_out(part, keys) for key in keys]


def _known(model: PreTrainedModel, names: list[str]) -> int:
    """How many names, from the first on, are modules. Some files leave the base model's out."""
    inner: nn.Module = model.base_model
    here = inner if names[0] in dict(inner.named_children()) else model
    for at, name in enumerate(names):
        child = dict(here.named_children()).get(name)
        if child is None:
            return at
        here = child
    return len(names)


def _left_out(part: tuple[str, ...], keys: Collection[str]) -> bool:
    """Whether the first names of these keys that the model has no module of are a part by itself:
    layers behind the last one that guess ahead, or several modules, in no layer."""
    *inside, name = part
    if any(map(str.isdigit, inside)):
        return False
    if name.isdigit():
        return any(map(_GUESSES.search, keys))
    return any(key.count(".") > len(part) for key in keys)
