"""The file of --state-dir: what administrators asked for, replaced as a whole.

Knows what an entry looks like and how to write it so that a crash leaves the old list or the new
one; what the entries mean is not its business.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fader_adapters.spec import ADAPTER_NAME, MAX_WEIGHT, NESTED_NAME
from fader_server.errors import ConfigInvalid

_log = logging.getLogger(__name__)
_VERSION = re.compile(r"[0-9a-f]{64}")
_FORMAT = 2
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
    unread: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Entries that nobody understands, by section, kept as they are."""


class StateFile:
    """adapters.json and its neighbours in one directory."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigInvalid when the directory cannot be made."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigInvalid(f"--state-dir {directory}: {error.strerror}") from None
        self._directory = directory
        self._path = directory / "adapters.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other servers from the directory; the lock ends with the process, however it ends.

        Raises ConfigInvalid when another one has it.
        """
        try:
            lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigInvalid(f"--state-dir {self._directory}: {error.strerror}") from None
        try:
            self._take(lock)
            yield
        finally:
            os.close(lock)

    def _take(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigInvalid(
                f"--state-dir {self._directory}: another server uses it; give each its own"
            ) from None

    def read(self) -> State:
        """Empty when there is no file; entries that cannot be read are told and skipped.

        Raises ConfigInvalid when the file as a whole is damaged.
        """
        try:
            stored = json.loads(self._path.read_bytes())
            form, content = stored["format"], _content(stored)
            if form > _FORMAT:
                raise ConfigInvalid(
                    f"{self._path} has format {form}, this version reads up to {_FORMAT}: use a "
                    "newer one, or remove the file"
                )
            if stored["sha256"] != _hash(content if form > 1 else content["adapters"]):
                raise ValueError("its content does not match its hash")
        except FileNotFoundError:
            return State()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigInvalid(
                f"{self._path} is damaged ({type(error).__name__}); mend it or remove it"
            ) from None
        return _Reader(content).state()

    def write(self, state: State) -> None:
        """Durable when this returns. Raises OSError, and then the old file stands."""
        content = _as_json(state)
        stored = {"format": _FORMAT, "sha256": _hash(content), **content}
        scratch = self._path.with_suffix(".new")
        with _descriptor(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
            rest = memoryview(json.dumps(stored, indent=1).encode())
            while rest:
                rest = rest[os.write(file, rest) :]
            os.fsync(file)
        os.replace(scratch, self._path)
        with _descriptor(self._directory, os.O_RDONLY | os.O_DIRECTORY) as directory:
            os.fsync(directory)


@contextmanager
def _descriptor(path: Path, flags: int) -> Iterator[int]:
    found = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield found
    finally:
        os.close(found)


def _content(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {name: stored[name] for name in stored if name not in ("format", "sha256")}


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _as_json(state: State) -> dict[str, Any]:
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
    return {
        section: dict(sorted({**state.unread.get(section, {}), **entries}.items()))
        for section, entries in known.items()
    }


class _Reader:
    """Takes the sections apart, entry by entry."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content
        self._unread: dict[str, dict[str, Any]] = {}

    def state(self) -> State:
        adapters = self._section("adapters", _adapter)
        return State(
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
    _check(bool(_VERSION.fullmatch(wanted.version)) and type(wanted.pin) is bool)
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
    _check(not at or bool(_VERSION.fullmatch(version)))


def _check_origin(source: object, revision: object) -> None:
    _check(isinstance(source, str) and (revision is None or isinstance(revision, str)))


def _check(condition: bool) -> None:
    if not condition:
        raise ValueError
