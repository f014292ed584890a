"""Where the modules of an adapter's model lie in the base: paths renamed, projections packed or
split. Knows names and shapes; reads no tensors.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from fader_adapters.errors import AdapterInvalid, AdapterMismatch
from fader_adapters.expert_places import places_of_experts
from fader_adapters.places import Place, Span
from fader_adapters.spec import PACKED, BaseSpec, LinearSpec

_WRAPPERS = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")
"""What stands before `layers.0…` in text models, headless ones and the text part of others."""

_TOWERS = ("vision_tower.", "vision_model.", "visual.", "audio_tower.", "multi_modal_projector.")
"""What older models name beside their text part, and newer ones inside `model.`."""
_INNER = ".vision_model."
"""What older ones have inside a tower besides."""
_HEAD = "unembed_tokens"
"""What Tinker calls the output head, in whichever model."""
_AROUND = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "base_model.model",
    "module",
)
"""What a wrapper of torch's, or a second one of PEFT's, calls the model inside of it."""


@dataclass(frozen=True, slots=True)
class View:
    """The base as an adapter's model names it: one prefix exchanged, or nothing."""

    theirs: str
    ours: str
    places: Mapping[str, Place]
    """By the base's path."""
    moved: Mapping[str, str]
    """Theirs → ours, of linears in towers that stand elsewhere in the adapter's model, and of an
    output head with another name."""

    def place(self, path: str) -> Place | None:
        """Of a module path of the adapter."""
        # An output head stands outside the wrapper and keeps its name.
        path = self.moved.get(path, path)
        if path in self.places or not path.startswith(self.theirs):
            return self.places.get(path)
        return self.places.get(self.ours + path.removeprefix(self.theirs))

    @property
    def theirs_too(self) -> Mapping[str, Place]:
        """The places that the adapter's model has as well, by its paths.

        Under another prefix it is another class of model: a text model has no tower for pictures.
        """
        same = self.theirs == self.ours
        back = {ours: theirs for theirs, ours in self.moved.items()}
        return {
            back.get(path) or self.their_path(path): place
            for path, place in self.places.items()
            if same or place.role != "linear" or path.startswith(self.ours)
        }

    def their_path(self, ours: str) -> str:
        """A base path as the adapter's model would name it."""
        if ours.startswith(self.ours):
            return self.theirs + ours.removeprefix(self.ours)
        return ours


def view_base(paths: Iterable[str], base: BaseSpec) -> View:
    """See the base as a model that has all these modules. Raises AdapterMismatch, and
    AdapterInvalid for names out of a wrapper."""
    paths = list(paths)
    places = _places(paths, base)
    places = places_of_experts(paths, places, base)
    moved = {path: there for path in paths for there in _moved(path, places)}
    found: dict[tuple[str, ...], View] = {}
    for theirs, ours in [("", "")] + [(t, o) for t in _WRAPPERS for o in _WRAPPERS if t != o]:
        view = View(theirs, ours, places, moved)
        mapped = tuple(place.path for place in map(view.place, paths) if place is not None)
        if len(set(mapped)) != len(paths):
            continue
        if (theirs, ours) == ("", ""):
            return view
        found.setdefault(mapped, view)
    if len(found) == 1:
        return next(iter(found.values()))
    stranger = next((path for path in paths if path not in places), paths[0])
    around = {f".{stranger}".find(f".{name}."): name for name in _AROUND}
    wrapper = around[min(at for at in around if at >= 0)] if max(around) >= 0 else None
    if wrapper is not None:  # the outermost
        raise AdapterInvalid(
            f"{stranger[:160]!r} was saved of a wrapped model: take {wrapper!r} out of the "
            "tensors' names, or save the model inside of the wrapper"
        )
    problem = "fits several places of" if found else "names no linear of"
    raise AdapterMismatch(
        f"{stranger[:160]!r} {problem} the base ({base.model_type}, {len(base.linears)} linears "
        f"such as {base.linears[0].path!r}): the adapter was made for another base"
    )


def _moved(path: str, places: Mapping[str, Place]) -> Iterator[str]:
    """Where a tower's linear of an older model lies in the base, or the head under Tinker's name;
    nothing where it did not move."""
    inside = path.removeprefix("model.")
    if inside == _HEAD and path not in places:
        yield from (there for there, place in places.items() if place.role == "head")
    if path in places or not inside.startswith(_TOWERS):
        return
    for there in (f"model.{inside}", f"model.{inside}".replace(_INNER, ".", 1)):
        if there in places:
            yield there
            return


def _places(paths: Collection[str], base: BaseSpec) -> dict[str, Place]:
    """Modules by path: the base's own, but packed or split where the adapter's names say so."""
    names = {_name(path) for path in paths}
    others = _Others(paths, base)
    places = {linear.path: _whole(i, linear) for i, linear in enumerate(base.linears)}
    for i, linear in enumerate(base.linears):
        parent, dot, name = linear.path.rpartition(".")
        parts = PACKED.get(name, ())
        fits = linear.role == "linear" and len(linear.parts) == len(parts)
        named = names.intersection(parts)
        if fits and name not in names and any(others.mean(parent + dot + p) for p in named):
            del places[linear.path]
            at = 0
            for part, rows in zip(parts, linear.parts, strict=True):
                place = _place(parent + dot + part, linear, (Span(i, at, at + rows),))
                places[place.path] = place
                at += rows
    for packed, parts in PACKED.items():
        if packed in names and not names.intersection(parts):
            _join(places, packed, parts, base, others)
    return places


class _Others:
    """Whether an adapter's names mean modules that the base has packed or split."""

    def __init__(self, paths: Collection[str], base: BaseSpec) -> None:
        self._own = {_name(linear.path) for linear in base.linears if linear.role == "linear"}
        self._given = {_every_layer(path) for path in paths}

    def mean(self, path: str) -> bool:
        """Whether it is a module of the adapter's model; `path` in the base, by another's name.

        Where the base has linears of that name elsewhere, the name may mean those alone: only
        paths that the adapter has, in one layer at least, tell.
        """
        if _name(path) not in self._own:
            return True
        inside = _every_layer(path)
        return any(
            theirs + inside.removeprefix(ours) in self._given
            for ours in _WRAPPERS
            if inside.startswith(ours)
            for theirs in _WRAPPERS
        )


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _every_layer(path: str) -> str:
    """The same for all layers."""
    return re.sub(r"\.\d+\.", ".*.", path)


def _join(
    places: dict[str, Place], packed: str, parts: tuple[str, ...], base: BaseSpec, others: _Others
) -> None:
    """Put one module in the place of siblings that read the same input."""
    for i, linear in enumerate(base.linears):
        parent, dot, name = linear.path.rpartition(".")
        siblings = [base.index_of.get(parent + dot + part) for part in parts]
        path = parent + dot + packed
        if name != parts[0] or path in base.index_of or None in siblings or not others.mean(path):
            continue
        indices = [index for index in siblings if index is not None]
        if any(base.linears[index].in_features != linear.in_features for index in indices):
            continue
        for index in indices:
            del places[base.linears[index].path]
        spans = tuple(Span(index, 0, base.linears[index].out_features) for index in indices)
        places[path] = _place(path, base.linears[i], spans)


def _whole(index: int, linear: LinearSpec) -> Place:
    place = _place(linear.path, linear, (Span(index, 0, linear.out_features),))
    return replace(place, experts=linear.experts)


def _place(path: str, linear: LinearSpec, spans: tuple[Span, ...]) -> Place:
    return Place(path, linear.in_features, spans, linear.role)
