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
    (r"(?P<path>.+?)(?:\.token_adapter)?\.base_layer\.(?P<role>weight)(?P<adapter>)", ""),
    (r"(?P<path>.+)\.original_module\.(?P<role>weight)(?P<adapter>)", ""),
    (rf"(?P<path>.+)\.modules_to_save{_ADAPTER}\.(?P<role>weight)", "kept "),
    (r"(?P<path>(?:.+\.)?(?!lora_)[^.]+)\.(?P<role>weight)(?P<adapter>)", "whole "),
)
_PATTERNS = tuple((re.compile(pattern), kind) for pattern, kind in _ROLES)

_WEIGHTS = frozenset(("weight", "kept weight", "whole weight"))
"""Roles of tensors that are all of a module's weight."""

_KNOWN_EXTRAS = {
    "lora_E": "AdaLoRA, which is not implemented",
    ".bias": "a trained bias of the base; train with bias='none', and leave modules that have one "
    "out of modules_to_save",
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
    """The base's own weights of adapted modules, saved beside the adapter."""
    whole: Mapping[str, TensorInfo] = field(default_factory=dict)
    """Whole weights of modules that are not adapted otherwise."""
    kept: Mapping[str, TensorInfo] = field(default_factory=dict)
    """The same once more, as PEFT's modules_to_save keeps it."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """As safetensors spells them, sorted."""
        infos = [info for module in self.modules.values() for info in module.infos]
        infos += [*self.tokens.values(), *self.whole.values()]
        return tuple(sorted({info.dtype for info in infos}))


def sort_tensors(infos: Iterable[TensorInfo]) -> Named:
    """Give every tensor its module. Raises AdapterInvalid for anything that has no known role."""
    found: dict[str, dict[str, TensorInfo]] = {}
    adapters: set[str | None] = set()
    for info in infos:
        path, role, adapter = _role(info.name)
        if role not in _WEIGHTS:
            adapters.add(adapter)
        own = found.setdefault(path, {})
        if role in own:
            raise AdapterInvalid(f"two tensors stand for {_shown(role)} of {path[:160]!r}")
        own[role] = info
    if len(adapters) > 1:
        raise AdapterInvalid(
            f"the tensors name several adapters ({', '.join(map(repr, adapters))[:120]}); save one"
        )
    others = _WEIGHTS | {"tokens"}
    modules = {path: _module(path, own) for path, own in found.items() if own.keys() - others}

    def of(role: str) -> dict[str, TensorInfo]:
        return {path: own[role] for path, own in found.items() if role in own}

    return Named(modules, of("tokens"), of("weight"), of("whole weight"), of("kept weight"))


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
    if "whole weight" in own:
        raise AdapterInvalid(
            f"tensor {own['whole weight'].name[:160]!r} is a whole weight, of a module that has "
            "LoRA factors: leave the module out of modules_to_save, or out of target_modules"
        )
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
