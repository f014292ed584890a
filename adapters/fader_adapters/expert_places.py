"""Experts as modules of their own, as models had them before they became parameters: where those
lie in the base's stacks. Knows names and shapes; reads no tensors.
"""

import re
from collections.abc import Collection, Iterator

from fader_adapters.places import Place, Span
from fader_adapters.spec import BaseSpec, LinearSpec

EXPERT = re.compile(r".+\.experts\.\d+\.([^.]+)", re.ASCII)
"""What `fullmatch` of the path of an expert's module accepts."""
_NAMES = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}
"""What the modules of a stack were called."""
_OLD, _NEW = ".block_sparse_moe.", ".mlp."
"""What a layer's mixture was called in some models."""


def places_of_experts(
    paths: Collection[str], places: dict[str, Place], base: BaseSpec
) -> dict[str, Place]:
    """The base's places, with modules of experts for stacks where the adapter's paths name some,
    and its mixtures under the older name where the paths have that alone."""
    found = {match[1] for path in paths if (match := EXPERT.fullmatch(path))}
    for index, linear in enumerate(base.linears):
        if linear.role == "experts" and found and linear.parts:
            modules = list(_modules(index, linear, found))
            if modules:
                del places[linear.path]
                places |= {place.path: place for place in modules}
    older = any(_OLD in path for path in paths)
    if not older or any(_OLD in linear.path for linear in base.linears):
        return places
    mixtures = {_mixture(item) for item in base.linears if item.role in ("experts", "router")}
    return {_older(path, mixtures): place for path, place in places.items()}


def _modules(index: int, linear: LinearSpec, found: set[str]) -> Iterator[Place]:
    parent, _, name = linear.path.rpartition(".")
    parts = next((names for names in _NAMES[name] if found.intersection(names)), ())
    for expert in range(linear.experts if parts else 0):
        at = 0
        for part, rows in zip(parts, linear.parts, strict=True):
            span = Span(index, at, at := at + rows, expert)
            path = f"{parent}.{expert}.{part}"
            yield Place(path, linear.in_features, (span,), linear.role)


def _mixture(linear: LinearSpec) -> str:
    """What the paths of a layer's mixture begin with."""
    parent = linear.path.rpartition(".")[0]
    return parent.rpartition(".")[0] if linear.role == "experts" else parent


def _older(path: str, mixtures: set[str]) -> str:
    before, new, after = path.partition(_NEW)
    return before + _OLD + after if new and before + _NEW.rstrip(".") in mixtures else path
