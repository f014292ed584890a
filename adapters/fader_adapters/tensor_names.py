"""Names of an adapter's tensors: which module each belongs to, and as what. Knows no base."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fader_adapters.errors import AdapterInvalid
from fader_adapters.header import TensorInfo

_PEFT_PREFIX = "base_model.model."
_ADAPTER = r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?"
_ROLES = (
    (rf"(?P<path>.+)\.lora_(?P<role>[AB]){_ADAPTER}\.weight", ""),
    (rf"(?P<path>.+)\.lora_embedding_(?P<role>[AB]){_ADAPTER}", "embedding "),
    (rf"(?P<path>.+)\.lora_(?P<role>magnitude)_vector{_ADAPTER}(?:\.weight)?", ""),
    (rf"(?P<path>.+)\.lora_B{_ADAPTER}\.(?P<role>bias)", ""),
    (rf"(?P<path>.+)\.token_adapter\.trainable_(?P<role>tokens)_delta{_ADAPTER}", ""),
    (r"(?P<path>.+)\.base_layer\.(?P<role>weight)(?P<adapter>)", ""),
)
_PATTERNS = tuple((re.compile(pattern), kind) for pattern, kind in _ROLES)

_KNOWN_EXTRAS = {
    "modules_to_save": "a full module (modules_to_save); train LoRA only",
    "lora_E": "AdaLoRA, which is not implemented",
    ".bias": "a trained bias of the base; train with bias='none'",
    ".base_layer.": "a copy of the base's own layer; save with save_embedding_layers=False",
    "embed_tokens": "full embeddings; save with save_embedding_layers=False",
    "lm_head.weight": "a full output head; save with save_embedding_layers=False",
}


@dataclass(frozen=True, slots=True)
class ModuleTensors:
    """What one module of the adapter's model has."""

    a: TensorInfo
    """[rank, in]"""
    b: TensorInfo
    """[out, rank]"""
    magnitude: TensorInfo | None = None
    """DoRA's [out], or [out, 1]"""
    bias: TensorInfo | None = None
    """Of B [out]"""
    embedding: bool = False
    """A and B are those of an embedding: in is the vocabulary."""

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        return tuple(i for i in (self.a, self.b, self.magnitude, self.bias) if i is not None)


@dataclass(frozen=True, slots=True)
class Named:
    """An adapter's tensors by module path, as the adapter's own model names it."""

    modules: Mapping[str, ModuleTensors]
    tokens: Mapping[str, TensorInfo] = field(default_factory=dict)
    """Trained rows of embeddings [tokens, width]."""
    copies: Mapping[str, TensorInfo] = field(default_factory=dict)
    """The base's own weights, saved beside the adapter."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """As safetensors spells them, sorted."""
        infos = [info for module in self.modules.values() for info in module.infos]
        return tuple(sorted({info.dtype for info in (*infos, *self.tokens.values())}))


def sort_tensors(infos: Iterable[TensorInfo]) -> Named:
    """Give every tensor its module. Raises AdapterInvalid for anything that has no known role."""
    found: dict[str, dict[str, TensorInfo]] = {}
    adapters: set[str | None] = set()
    for info in infos:
        path, role, adapter = _role(info.name)
        if role != "weight":
            adapters.add(adapter)
        own = found.setdefault(path, {})
        if role in own:
            raise AdapterInvalid(f"two tensors stand for {_shown(role)} of {path[:160]!r}")
        own[role] = info
    if len(adapters) > 1:
        raise AdapterInvalid(
            f"the tensors name several adapters ({', '.join(map(repr, adapters))[:120]}); save one"
        )
    modules = {p: _module(p, own) for p, own in found.items() if own.keys() - {"tokens", "weight"}}
    return Named(
        modules,
        {path: own["tokens"] for path, own in found.items() if "tokens" in own},
        {path: own["weight"] for path, own in found.items() if "weight" in own},
    )


def _role(name: str) -> tuple[str, str, str | None]:
    """(module path, role, adapter's name)"""
    for pattern, kind in _PATTERNS:
        match = pattern.fullmatch(name)
        if match is not None:
            path = match["path"].removeprefix(_PEFT_PREFIX)
            return path, kind + match["role"], match["adapter"]
    raise AdapterInvalid(_explain_extra(name))


def _module(path: str, own: dict[str, TensorInfo]) -> ModuleTensors:
    kinds = [kind for kind in ("", "embedding ") if {f"{kind}A", f"{kind}B"} & own.keys()]
    if len(kinds) != 1:
        raise AdapterInvalid(f"{path[:160]!r} has {', '.join(map(_shown, own))} but no lora_A, B")
    (kind,) = kinds
    for there, missing in (("A", "B"), ("B", "A")):
        if kind + missing not in own:
            raise AdapterInvalid(
                f"{path[:160]!r} has {_shown(kind + there)} but no {_shown(kind + missing)}"
            )
    return ModuleTensors(
        own[f"{kind}A"], own[f"{kind}B"], own.get("magnitude"), own.get("bias"), bool(kind)
    )


def _shown(role: str) -> str:
    named = {"magnitude": "lora_magnitude_vector", "bias": "lora_B.bias", "tokens": "token rows"}
    return named.get(role, f"lora_{role.replace(' ', '_')}")


def _explain_extra(name: str) -> str:
    for mark, meaning in _KNOWN_EXTRAS.items():
        if mark in name:
            return f"tensor {name[:160]!r} is {meaning}"
    return f"tensor {name[:160]!r} is no part of a LoRA pair (….lora_A.weight, ….lora_B.weight)"
