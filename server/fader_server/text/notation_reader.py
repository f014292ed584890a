"""Reads arguments that are members in a notation, as they come. Knows no calls around them.

Beside what a template writes it reads what models write there: the words of Python and of JSON,
texts in either kind of quotes and, where a special token quotes texts, values without any, which
are what their schema says.
"""

import re
from collections.abc import Callable
from string import hexdigits
from sys import maxunicode
from typing import Any

from fader_server.text.notation import Notation
from fader_server.text.tool_format import CONTROL
from fader_server.text.tool_scan import Broken, Reading, skip
from fader_server.text.tool_values import load_json, read_value

Types = Callable[[str], frozenset[str]]
"""The JSON types of a key's value; empty: any."""
_DEPTH = 64
_CLOSERS = {"(": ")", "[": "]", "{": "}"}
_QUOTES = ("'", '"')
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a",
            "0": "\0", "\\": "\\", "'": "'", '"': '"', "/": "/", "\n": ""}  # fmt: skip
_CODES = {"x": 2, "u": 4, "U": 8}
"""Hexadecimal digits behind."""
_WORD = re.compile(r"[+-]?[\w.][\w.+-]*", re.ASCII)
_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_TOKENS = frozenset(map(chr, CONTROL))
_ANY: frozenset[str] = frozenset()


class Members:
    """Reads them in one notation."""

    def __init__(self, notation: Notation, types: Types) -> None:
        self._marked = notation.quote
        self._within = notation.within.strip()
        self._types = types

    def read(self, first: str, closer: str) -> Reading[dict[str, Any]]:
        """From the first character behind the bracket to the one that closes it."""
        return (yield from self._members(first, closer, self._within, self._types, 0))

    def _members(
        self, first: str, closer: str, within: str, types: Types, depth: int
    ) -> Reading[dict[str, Any]]:
        found: dict[str, Any] = {}
        char = yield from _solid(first)
        while char != closer:
            key, char = yield from self._key(char, within)
            if char != within or not key or key in found:
                raise Broken
            value, char = yield from self._value((yield from skip()), types(key), depth + 1)
            found[key] = value
            char = yield from self._next(char, closer)
        return found

    def _items(self, closer: str, depth: int) -> Reading[list[Any]]:
        found: list[Any] = []
        char = yield from skip()
        while char != closer:
            value, char = yield from self._value(char, _ANY, depth + 1)
            found.append(value)
            char = yield from self._next(char, closer)
        return found

    def _next(self, char: str, closer: str) -> Reading[str]:
        """Where the next member begins, or the closer."""
        char = yield from _solid(char)
        if char == ",":
            return (yield from skip())
        if char != closer:
            raise Broken
        return char

    def _key(self, first: str, within: str) -> Reading[tuple[str, str]]:
        """And the first character behind it that is no white space."""
        if first and (first == self._marked or first in _QUOTES):
            key = yield from self._text(first)
            return key, (yield from skip())
        key, char = "", first
        if not self._marked and within != self._within:
            raise Broken  # Python's objects have no names for keys
        while char and char != within and char not in _TOKENS and char not in ",=:()[]{}\"'\n":
            key += char
            char = yield
        return key.strip(), (yield from _solid(char))

    def _value(self, first: str, types: frozenset[str], depth: int) -> Reading[tuple[Any, str]]:
        """And the character behind it."""
        if depth > _DEPTH or not first:
            raise Broken
        if first == self._marked or first in _QUOTES:
            value: Any = yield from self._text(first)
        elif first == "{":
            within = self._within if self._marked else ":"
            char = yield
            value = yield from self._members(char, "}", within, lambda key: _ANY, depth)
        elif first in "[(":
            value = yield from self._items(_CLOSERS[first], depth)
        else:
            return (yield from self._bare(first, types))
        return value, (yield)

    def _text(self, quote: str) -> Reading[str]:
        """To where it is closed. One that a special token quotes has no escapes."""
        parts: list[str] = []
        while (char := (yield)) != quote:
            if not char or char in _TOKENS:
                raise Broken
            escaped = char == "\\" and quote in _QUOTES
            parts.append((yield from _escaped()) if escaped else char)
        return _PAIR.sub(_joined, "".join(parts))

    def _bare(self, first: str, types: frozenset[str]) -> Reading[tuple[Any, str]]:
        text, char = "", first
        while char and char not in _TOKENS and char not in ",()[]{}\n":
            text += char
            char = yield
        text = text.strip()
        if self._marked and text:
            return read_value(text, types), char
        if text in _WORDS:
            return _WORDS[text], char
        if not _WORD.fullmatch(text):
            raise Broken
        return load_json(text), char


def _solid(char: str) -> Reading[str]:
    """This character, or the next that is no white space."""
    if not char:
        raise Broken
    return (yield from skip(char))


def _escaped() -> Reading[str]:
    """What stands for the character behind a backslash; an unknown one is no escape."""
    char = yield
    if not char:
        raise Broken
    if char not in _CODES:
        return _ESCAPES.get(char, "\\" + char)
    digits = ""
    for _ in range(_CODES[char]):
        digit = yield
        if not digit or digit not in hexdigits:
            raise Broken
        digits += digit
    code = int(digits, 16)
    if code > maxunicode:
        raise Broken
    return chr(code)


def _joined(pair: re.Match[str]) -> str:
    """Halves of a character, as JSON writes it."""
    return pair[0].encode("utf-16", "surrogatepass").decode("utf-16")
