"""Reads typed fields out of a JSON object: strict types, null means unset, unknown names judged.

Collects problems instead of stopping at the first, reports at most three, never repeats a value.
"""

import difflib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

from fader_server.errors import RequestInvalid

MAX_PROBLEMS = 3
MAX_FIELDS = 64
"""Unknown names in one object, or in all of one kind: judging each costs a comparison with every
known one."""
_OWN = ("adapter", "lora", "gamma", "gama", "blend", "recipe")
"""Unknown fields that begin like this mean our extension; ignoring them would serve the base."""


class Fields:
    """One JSON object being read. Ask for every field, then call `finish`."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.ignored = 0
        """Unknown fields so far, and keys in fields, that change nothing here."""
        self._body = body
        self._problems: list[tuple[str, str]] = []  # the field, the problem in words

    def raw(self, name: str) -> Any:  # noqa: ANN401 - any JSON value
        """The value as parsed; None when absent or null."""
        return self._body.get(name)

    def refuse(self, name: str, text: str, *, inside: str = "") -> None:
        """Note that a field is wrong; `text` completes "<field> …".

        inside: where in the field, such as [2]; told in words, while `param` is the field.
        """
        self._problems.append((name, f"{name}{inside} {text}"))

    def integer(self, name: str, default: int, *, low: int, high: int) -> int:
        value = self.raw(name)
        if value is None:
            return default
        if type(value) is float and value.is_integer():
            value = int(value)  # 16.0 is JSON for 16
        if type(value) is not int or not low <= value <= high:
            self.refuse(name, f"must be an integer from {low} to {high}")
            return default
        return value

    def optional_integer(self, name: str, *, low: int, high: int) -> int | None:
        return None if self.raw(name) is None else self.integer(name, low, low=low, high=high)

    def number(self, name: str, default: float, *, low: float, high: float) -> float:
        value = self.raw(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not low <= value <= high:
            self.refuse(name, f"must be a number from {low:g} to {high:g}")
            return default
        return float(value)

    def boolean(self, name: str, *, default: bool = False) -> bool:
        value = self.raw(name)
        if value is None:
            return default
        if type(value) is not bool:
            self.refuse(name, "must be true or false")
            return default
        return value

    def string(
        self, name: str, default: str = "", *, longest: int = 1 << 20, required: bool = False
    ) -> str:
        value = self.raw(name)
        if value is None:
            if required:
                self.refuse(name, "is required")
            return default
        if not is_text(value) or len(value) > longest or (required and not value):
            self.refuse(name, f"must be text of {1 if required else 0} to {longest} characters")
            return default
        return value

    def array(self, name: str, *, most: int) -> list[Any] | None:
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, list) or not 1 <= len(value) <= most:
            self.refuse(name, f"must be a list of 1 to {most} items")
            return None
        return value

    def texts(self, name: str, *, most: int, longest: int, alone: bool = False) -> tuple[str, ...]:
        """None of them empty. alone: a text by itself is a list of one."""
        value = self.raw(name)
        items = [value] if alone and isinstance(value, str) else value
        if items is None or items == []:
            return ()
        good = isinstance(items, list) and len(items) <= most
        if not good or not all(is_text(item) and 0 < len(item) <= longest for item in items):
            form = f"a list of up to {most} texts of 1 to {longest} characters"
            self.refuse(name, f"must be {'text or ' if alone else ''}{form}")
            return ()
        return tuple(items)

    def only(self, name: str, allowed: Callable[[Any], bool], text: str) -> None:
        """Refuse a field we do not implement unless its value changes nothing."""
        value = self.raw(name)
        if value is not None and not allowed(value):
            self.refuse(name, text)

    def unknown(self, known: Collection[str], *, strict: bool = False) -> None:
        """Refuse near misses of `known` (all others when strict); count what is ignored."""
        strangers = _strangers([self._body], known)
        if len(strangers) > MAX_FIELDS:
            self.refuse("the body", f"has more than {MAX_FIELDS} fields that are not known here")
            return
        for name in strangers:
            near = _near(name, known)
            ours = name.lower().startswith(_OWN)
            if strict or near or ours:
                hint = f"did you mean {near}?" if near else "see the API's field list"
                shown = name if near or (len(name) <= 32 and name.isidentifier()) else "a field"
                self.refuse(shown if shown.isascii() else "a field", f"is not known here; {hint}")
                if len(self._problems) >= MAX_PROBLEMS:
                    break
            else:
                self.ignored += 1

    def unknown_inside(
        self, field: str, objects: Iterable[dict[str, Any]], known: Collection[str]
    ) -> None:
        """The same for all objects of one kind in a field; a name counts wherever it stands."""
        strangers = _strangers(objects, known)
        if len(strangers) > MAX_FIELDS:
            self.refuse(field, f"has more than {MAX_FIELDS} keys that are not known here")
            return
        for name in strangers:
            near = _near(name, known)
            if near:
                shown = name if name.isascii() else "a key"
                self.refuse(field, f"has {shown}, which is not known here; did you mean {near}?")
        self.ignored += strangers.total()

    def finish(self, *, code: str | None = None) -> None:
        """Raise RequestInvalid with the first problems, if any."""
        if not self._problems:
            return
        shown = self._problems[:MAX_PROBLEMS]
        text = "; ".join(problem for _, problem in shown)
        more = len(self._problems) - len(shown)
        text += f" (and {more} more)" if more else ""
        raise RequestInvalid(text, param=shown[0][0], code=code)


def _strangers(objects: Iterable[dict[str, Any]], known: Collection[str]) -> Counter[str]:
    """Names that are not known, how often each has a value that is not null."""
    pairs = (pair for item in objects for pair in item.items())
    return Counter(name for name, value in pairs if value is not None and name not in known)


def _near(name: str, known: Collection[str]) -> str | None:
    """The known name that this one may have been meant to be."""
    return next(iter(difflib.get_close_matches(name[:64], known, n=1, cutoff=0.88)), None)


def is_text(value: object) -> bool:
    """A string that UTF-8 can carry: no lone surrogates."""
    if type(value) is not str:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_finite(value: object) -> bool:
    """A JSON number, bool excluded, neither NaN nor infinite as a float."""
    try:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:
        return False
