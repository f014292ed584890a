"""The grammar of arguments that are members in a notation: in the order of their properties, those
that are not required maybe.

Where texts are quoted as in Python, what is no word of Python's is JSON. Where a special token
quotes them, schemas are followed as far as they are of the keywords here: to the letter for a
strict tool, which is refused else.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from fader_server.text.notation import Notation
from fader_server.text.tool_rules import Rules, unwritable
from fader_server.text.tool_values import alternatives, is_of, keys_of, types_in, values_of
from fader_server.text.tools import Tool

_NOTES = frozenset((
    "$comment", "$defs", "$schema", "const", "default", "definitions", "deprecated", "description",
    "enum", "examples", "title", "type",
))  # fmt: skip
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_KEPT: Mapping[str, tuple[str, ...]] = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "minItems", "maxItems"),
    "string": ("minLength", "maxLength"),
    "integer": _NUMBERS,
    "number": _NUMBERS,
    "boolean": (),
    "null": (),
}
"""Keywords that are followed to the letter, by type."""
_KNOWN = _NOTES.union(*_KEPT.values())
_NAME = r"/[a-zA-Z_][a-zA-Z0-9_]{0,63}/"
_HALF = re.compile("[\ud800-\udfff]")
_DEPTH = 64
_FOREIGN = frozenset(",:=()[]{}\"'\n\r\t")
"""Characters that no key has here."""


class MemberRules:
    """Of one tool's arguments."""

    def __init__(self, rules: Rules, tool: Tool, notation: Notation, name: str) -> None:
        self._rules = rules
        self._tool = tool
        self._notation = notation
        self._name = name
        self._quote = rules.literal(notation.quote)
        self._root = tool.parameters
        self._made: dict[str, str] = {}
        """Rules of values by their schemas."""
        self._count = self._depth = 0

    def arguments(self) -> str:
        """What follows the first bracket, to the last."""
        self._check(self._root, frozenset(("object",)))
        return f"{self._members(self._root)} {json.dumps(self._notation.brackets[1])}"

    def _value(self, schema: object) -> str:
        """A rule for a value that has a schema."""
        if schema is False:
            raise unwritable(self._tool)
        shape = schema if isinstance(schema, Mapping) else {}
        key = json.dumps(shape, sort_keys=True)
        if key not in self._made:
            name = self._made[key] = self._new()
            self._depth += 1
            if self._depth > _DEPTH:
                raise unwritable(self._tool)
            ways = [self._way(way) for way in alternatives(shape, self._root)]
            self._depth -= 1
            self._rules.rule(name, " | ".join(dict.fromkeys(ways)))
        return self._made[key]

    def _way(self, way: Mapping[str, Any]) -> str:
        """One alternative of a value."""
        values = values_of(way)
        if values is not None:
            self._check(way, frozenset())
            named = types_in(way)
            kept = [self._literal(value) for value in values if not named or is_of(value, named)]
            if not kept:
                raise unwritable(self._tool)
            return " | ".join(kept)
        types = types_in(way) & _KEPT.keys() or frozenset(_KEPT)
        if not self._notation.quote:
            return self._python(way, types)
        self._check(way, types)
        return " | ".join(self._of_type(name, way) for name in sorted(types))

    def _python(self, way: Mapping[str, Any], types: frozenset[str]) -> str:
        """Its words for truth and nothing, also in lists, else JSON."""
        own = types & {"boolean", "null"} if _KNOWN.issuperset(way) else frozenset[str]()
        if not way.keys() - _NOTES - {*_KEPT["array"]}:
            own |= types & {"array"}  # its items may be such words
        words = [self._of_type(name, way) for name in sorted(own)]
        others = sorted(types - own)
        if others:
            shared = {key: self._root[key] for key in ("$defs", "definitions") if key in self._root}
            made = {**shared, **way, "type": others if len(others) > 1 else others[0]}
            words.append(self._rules.json(self._new(), made, self._tool))
        return " | ".join(words)

    def _of_type(self, name: str, way: Mapping[str, Any]) -> str:
        if name == "string":
            return f"{self._quote} {self._text(way)} {self._quote}"
        if name == "boolean":
            return " | ".join(json.dumps(self._notation.word(value)) for value in (True, False))
        if name == "null":
            return json.dumps(self._notation.word(None))
        if name == "object":
            return f'"{{" {self._members(way)} "}}"'
        if name == "array":
            return f'"[" {self._items(way)} "]"'
        bounds = {key: way[key] for key in _NUMBERS if key in way}
        return self._rules.json(self._new(), {"type": name, **bounds}, self._tool)

    def _text(self, way: Mapping[str, Any]) -> str:
        low, high = _count(way, "minLength") or 0, _count(way, "maxLength")
        if not low and high is None:
            return "TEXT"
        count = f"{{{low},{'' if high is None else high}}}"
        return self._rules.rule(self._new().upper(), rf"/(.|\n){count}/")

    def _items(self, way: Mapping[str, Any]) -> str:
        low, high = _count(way, "minItems") or 0, _count(way, "maxItems")
        if high == 0:
            return ""
        value, apart = self._value(way.get("items")), json.dumps(self._notation.apart)
        more = f"{{{max(low - 1, 0)},{'' if high is None else max(high, low) - 1}}}"
        some = f"{value} ({apart} {value}){more}"
        return some if low else f"({some})?"

    def _members(self, way: Mapping[str, Any]) -> str:
        keys, apart = keys_of(way), json.dumps(self._notation.apart)
        extra = way.get("additionalProperties")
        if not keys:
            if extra is False or way is self._root:
                return ""
            name = self._rules.rule(self._new().upper(), _NAME)
            one = f"{name} {json.dumps(self._notation.within)} {self._value(extra)}"
            return f"({one} ({apart} {one})*)?"
        return self._in_order(way, keys, apart)

    def _in_order(self, way: Mapping[str, Any], keys: Mapping[str, bool], apart: str) -> str:
        """Rules from the last key to the first: of those that come if none has come before, and if
        one has."""
        shapes = way.get("properties")
        first = more = ""
        for key, needed in reversed([*keys.items()]):
            if not key or key.strip() != key or not _FOREIGN.isdisjoint(key):
                raise unwritable(self._tool)
            shape = shapes.get(key) if isinstance(shapes, Mapping) else None
            head = json.dumps(key + self._notation.within, ensure_ascii=False)
            member = f"{head} {self._value(shape)}"
            begun = f"{member} {more}"
            first = begun if needed else f"{begun} | {first}" if first else f"({begun})?"
            first = self._rules.rule(self._new(), first)
            another = f"{apart} {member}"
            more = f"{another} {more}" if needed else f"({another})? {more}"
            more = self._rules.rule(self._new(), more)
        return first

    def _literal(self, value: Any) -> str:  # noqa: ANN401 - any JSON value
        """One that is listed."""
        mark, written = self._notation.quote, self._notation.written(value)
        parts = written.split(mark) if mark else [written]
        if any(_HALF.search(part) for part in parts):
            raise unwritable(self._tool)
        return f" {self._quote} ".join(json.dumps(part, ensure_ascii=False) for part in parts)

    def _check(self, way: Mapping[str, Any], types: frozenset[str]) -> None:
        followed = _NOTES.union(*(_KEPT[name] for name in types))
        if self._tool.strict and not followed.issuperset(way):
            raise unwritable(self._tool)

    def _new(self) -> str:
        self._count += 1
        return f"{self._name}_{self._count}"


def _count(way: Mapping[str, Any], key: str) -> int | None:
    found = way.get(key)
    return found if type(found) is int and found >= 0 else None
