"""Names of LoRA tensors: pairs of A and B, and the linears of the base they belong to."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fader_adapters.errors import AdapterInvalid, AdapterMismatch
from fader_adapters.header import TensorInfo
from fader_adapters.spec import BaseSpec

_PEFT_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")

_WRAPPERS = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")
"""What stands before `layers.0…` in text models, headless ones and the text part of others."""

_KNOWN_EXTRAS = {
    "lora_embedding_": "an adapted embedding; train on linears only",
    "lora_magnitude_vector": "DoRA, which is not implemented",
    "modules_to_save": "a full module (modules_to_save); train LoRA only",
    "lora_E": "AdaLoRA, which is not implemented",
    ".base_layer.": "a copy of the base's own weight; save with save_embedding_layers=False",
    ".bias": "a trained bias; train with bias='none' and lora_bias=False",
    "embed_tokens": "full embeddings; save with save_embedding_layers=False",
    "lm_head.weight": "a full output head; save with save_embedding_layers=False",
}


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors of one module's delta."""

    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True, slots=True)
class Mapping:
    """How the adapter's module paths translate to the base's: one prefix exchanged, or nothing."""

    theirs: str
    ours: str
    linear_of: dict[str, int]
    """From the adapter's path to the index in BaseSpec.linears."""

    def their_path(self, ours: str) -> str:
        """A base path as the adapter's model would name it."""
        if ours.startswith(self.ours):
            return self.theirs + ours.removeprefix(self.ours)
        return ours


def pair_factors(infos: Iterable[TensorInfo]) -> dict[str, Pair]:
    """Module path → its A and B. Raises AdapterInvalid for anything that is not such a pair."""
    factors: dict[str, dict[str, TensorInfo]] = {}
    adapters: set[str | None] = set()
    for info in infos:
        match = _FACTOR.fullmatch(info.name)
        if match is None:
            raise AdapterInvalid(_explain_extra(info.name))
        path = match["path"].removeprefix(_PEFT_PREFIX)
        adapters.add(match["adapter"])
        pair = factors.setdefault(path, {})
        if match["factor"] in pair:
            raise AdapterInvalid(f"two tensors stand for lora_{match['factor']} of {path!r}")
        pair[match["factor"]] = info
    if len(adapters) > 1:
        raise AdapterInvalid(
            f"the tensors name several adapters ({', '.join(map(repr, adapters))[:120]}); save one"
        )
    for path, pair in factors.items():
        if len(pair) == 1:
            there, missing = ("A", "B") if "A" in pair else ("B", "A")
            raise AdapterInvalid(f"{path!r} has lora_{there} but no lora_{missing}")
    return {path: Pair(pair["A"], pair["B"]) for path, pair in factors.items()}


def map_to_base(paths: Iterable[str], base: BaseSpec) -> Mapping:
    """Give every module of the adapter its linear of the base. Raises AdapterMismatch."""
    paths = list(paths)
    found: dict[tuple[int, ...], Mapping] = {}
    for theirs, ours in [("", "")] + [(t, o) for t in _WRAPPERS for o in _WRAPPERS if t != o]:
        mapped = [base.index_of.get(_translate(path, theirs, ours, base)) for path in paths]
        indexes = tuple(index for index in mapped if index is not None)
        if len(set(indexes)) != len(paths):
            continue
        mapping = Mapping(theirs, ours, dict(zip(paths, indexes, strict=True)))
        if (theirs, ours) == ("", ""):
            return mapping
        found.setdefault(indexes, mapping)
    if len(found) == 1:
        return next(iter(found.values()))
    stranger = next((path for path in paths if path not in base.index_of), paths[0])
    problem = "fits several places of" if found else "names no linear of"
    raise AdapterMismatch(
        f"{stranger[:160]!r} {problem} the base ({base.model_type}, {len(base.linears)} linears "
        f"such as {base.linears[0].path!r}): the adapter was made for another base"
    )


def _translate(path: str, theirs: str, ours: str, base: BaseSpec) -> str:
    # An output head stands outside the wrapper and keeps its name.
    if path in base.index_of or not path.startswith(theirs):
        return path
    return ours + path.removeprefix(theirs)


def _explain_extra(name: str) -> str:
    for mark, meaning in _KNOWN_EXTRAS.items():
        if mark in name:
            return f"tensor {name[:160]!r} is {meaning}"
    return f"tensor {name[:160]!r} is no part of a LoRA pair (….lora_A.weight, ….lora_B.weight)"
