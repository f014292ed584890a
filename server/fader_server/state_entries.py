"""The entries of the state file: what each looks like in memory and in JSON, and its checks."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fader_adapters.spec import ADAPTER_NAME, DIGEST, MAX_WEIGHT, NESTED_NAME

_log = logging.getLogger(__name__)
_Entry = TypeVar("_Entry")


@dataclass(frozen=True, slots=True)
class Wanted:
    """One adapter that shall be there; its version, so that a changed source is noticed."""

    source: str
    revision: str | None
    version: str
    pin: bool


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a version that a recipe names came from."""

    source: str
    revision: str | None


@dataclass(frozen=True, slots=True)
class WantedRecipe:
    """One recipe: its terms as pairs of `name` or `name@version` and a weight."""

    terms: tuple[tuple[str, float], ...]
    created: int


@dataclass(frozen=True, slots=True)
class State:
    """The whole list. Replace its parts, never change them."""

    adapters: Mapping[str, Wanted | None] = field(default_factory=dict)
    """None: the name was unloaded, though the command line or a root may offer it."""
    pins: frozenset[str] = frozenset()
    """Pinned names that the command line or a root offers."""
    recipes: Mapping[str, WantedRecipe] = field(default_factory=dict)
    versions: Mapping[str, Origin] = field(default_factory=dict)
    """By `name@version`: those that recipes name."""
    base: str = ""
    """The identity of the base that the list was made beside; empty in lists of older versions."""
    unread: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Entries that nobody understands, by section, kept as they are."""


def as_json(state: State) -> dict[str, Any]:
    """The state as sections of entries, each section sorted, and the base where it is known."""
    known: dict[str, dict[str, Any]] = {
        "adapters": {
            name: wanted
            and {
                "source": wanted.source,
                "revision": wanted.revision,
                "version": wanted.version,
                "pin": wanted.pin,
            }
            for name, wanted in state.adapters.items()
        },
        "pins": dict.fromkeys(state.pins, True),
        "recipes": {
            name: {
                "adapters": [{"name": ref, "weight": weight} for ref, weight in recipe.terms],
                "created": recipe.created,
            }
            for name, recipe in state.recipes.items()
        },
        "versions": {
            ref: {"source": origin.source, "revision": origin.revision}
            for ref, origin in state.versions.items()
        },
    }
    sections: dict[str, Any] = {
        section: dict(sorted({**state.unread.get(section, {}), **entries}.items()))
        for section, entries in known.items()
    }
    return sections | ({"base": state.base} if state.base else {})


def from_json(content: Mapping[str, Any]) -> State:
    """The reverse; entries that cannot be read are told, and kept as they are."""
    return _Reader(content).state()


class _Reader:
    """Takes the sections apart, entry by entry."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content
        self._unread: dict[str, dict[str, Any]] = {}

    def state(self) -> State:
        adapters, base = self._section("adapters", _adapter), self._content.get("base", "")
        return State(
            base=base if isinstance(base, str) else "",
            adapters=adapters,
            pins=frozenset(self._section("pins", _pin)),
            recipes=self._section("recipes", _recipe),
            versions=self._section("versions", _origin),
            unread=self._unread,
        )

    def _section(self, section: str, read: Callable[[str, Any], _Entry]) -> dict[str, _Entry]:
        entries = self._content.get(section, {})
        found: dict[str, _Entry] = {}
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            try:
                found[name] = read(name, entry)
            except (ValueError, KeyError, TypeError):
                self._unread.setdefault(section, {})[name] = entry
                fields = {"section": section, "entry": name[:160]}
                _log.warning("an entry of the state is not understood", extra={"fields": fields})
        return found


def _adapter(name: str, entry: Any) -> Wanted | None:  # noqa: ANN401 - any JSON value
    _check(bool(ADAPTER_NAME.fullmatch(name) or NESTED_NAME.fullmatch(name)))
    if entry is None:
        return None
    wanted = Wanted(entry["source"], entry["revision"], entry["version"], entry["pin"])
    _check_origin(wanted.source, wanted.revision)
    _check(bool(DIGEST.fullmatch(wanted.version)) and type(wanted.pin) is bool)
    return wanted


def _pin(name: str, entry: Any) -> bool:  # noqa: ANN401 - any JSON value
    _check(entry is True)
    return entry


def _recipe(name: str, entry: Any) -> WantedRecipe:  # noqa: ANN401 - any JSON value
    terms = tuple((term["name"], term["weight"]) for term in entry["adapters"])
    _check(bool(ADAPTER_NAME.fullmatch(name)) and bool(terms) and type(entry["created"]) is int)
    for ref, weight in terms:
        _check_ref(ref)
        _check(type(weight) in (int, float) and math.isfinite(weight))
        _check(abs(weight) <= MAX_WEIGHT)
    return WantedRecipe(tuple((ref, float(weight)) for ref, weight in terms), entry["created"])


def _origin(ref: str, entry: Any) -> Origin:  # noqa: ANN401 - any JSON value
    _check_ref(ref)
    origin = Origin(entry["source"], entry["revision"])
    _check_origin(origin.source, origin.revision)
    return origin


def _check_ref(ref: str) -> None:
    name, at, version = ref.partition("@")
    _check(bool(ADAPTER_NAME.fullmatch(name) or NESTED_NAME.fullmatch(name)))
    _check(not at or bool(DIGEST.fullmatch(version)))


def _check_origin(source: object, revision: object) -> None:
    _check(isinstance(source, str) and (revision is None or isinstance(revision, str)))


def _check(condition: bool) -> None:
    if not condition:
        raise ValueError
