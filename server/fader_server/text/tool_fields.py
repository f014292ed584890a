"""The grammar of arguments that are written one by one, between markers."""

import json
from collections.abc import Mapping
from typing import Any

from fader_server.text.tool_format import FieldStyle
from fader_server.text.tool_rules import Rules, plain_length, unwritable
from fader_server.text.tool_values import (
    keys_of,
    read_value,
    types_in,
    types_of,
    values_of,
    ways_of,
)
from fader_server.text.tools import Tool

_PLAIN = frozenset((
    "$defs", "$schema", "additionalProperties", "default", "definitions", "deprecated",
    "description", "enum", "const", "examples", "properties", "required", "title", "type",
))  # fmt: skip
"""Keywords that fields follow to the letter: of the parameters, and of those that are text."""


class Fields:
    """The rules of one tool's arguments, where they are written one by one: in the order of its
    properties, those that are not required maybe."""

    def __init__(self, rules: Rules, tool: Tool, style: FieldStyle, name: str) -> None:
        self._rules = rules
        self._tool = tool
        self._style = style
        self._name = name
        self._root = tool.parameters
        if tool.strict and not _PLAIN.issuperset(self._root):
            raise unwritable(tool)

    def items(self) -> str:
        """What follows the name."""
        keys = keys_of(self._root)
        items = [(self._item(at, key), needed) for at, (key, needed) in enumerate(keys.items())]
        return " ".join(item if needed else f"({item})?" for item, needed in items)

    def _item(self, at: int, key: str) -> str:
        style, end = self._style, self._style.after.split()[0]
        if style.within.split()[0] in key or key != key.strip():
            raise unwritable(self._tool)
        ways = ways_of(self._root, key)
        types = types_of(ways)
        head = self._rules.literal(style.before + key + style.within)
        name = f"{self._name}_{at}"
        if any(self._is_text(way) for way in ways):
            if self._tool.strict and not types <= {"string", "null"}:
                raise unwritable(self._tool)  # a text that reads as a number would be one
            plain = end[: plain_length(end)]
            rest = self._rules.literal(style.after[style.after.index(end) + len(plain) :])
            value = f"{name}[suffix={json.dumps(plain)}]" if plain else name
            self._rules.rule(value, r"/(.|\n)*/")
            return f"{head} {name} {rest}"
        values = [self._value(f"{name}_{i}", way, types, end) for i, way in enumerate(ways)]
        return f"{head} ({' | '.join(values)}) {self._rules.literal(style.after)}"

    def _is_text(self, way: Mapping[str, Any]) -> bool:
        """Whether any text will do. Other constraints on text cannot be kept up to a marker."""
        types = types_in(way)
        if (types and "string" not in types) or values_of(way) is not None:
            return False
        if self._tool.strict and not _PLAIN.issuperset(way):
            raise unwritable(self._tool)
        return True

    def _value(self, name: str, way: Mapping[str, Any], types: frozenset[str], end: str) -> str:
        values = values_of(way)
        if values is None or not any(isinstance(value, str) for value in values):
            shared = {key: self._root[key] for key in ("$defs", "definitions") if key in self._root}
            return self._rules.json(name, {**shared, **way}, self._tool)
        texts = [v if isinstance(v, str) else json.dumps(v) for v in values]
        back = [read_value(text, types) for text in texts]
        if back != values or any(end in text for text in texts):
            raise unwritable(self._tool)
        return self._rules.rule(name, " | ".join(json.dumps(text) for text in texts))
