"""One call or list of calls of tools in the text of an answer, from its name or bracket to its end.
Knows no markers around them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from fader_server.text.notation import Notation
from fader_server.text.notation_reader import Members
from fader_server.text.tool_format import FieldStyle, ToolFormat
from fader_server.text.tool_scan import (
    Broken,
    Following,
    Reading,
    all_of,
    identifier,
    json_text,
    one_of,
    skip,
    until,
)
from fader_server.text.tool_values import load_json, read_value, types_of, ways_of, written_object
from fader_server.text.tools import CallPart, Tool, ToolUse

_KEYS = ("name", "arguments"), ("name", "parameters")
_END = CallPart("", "", True)


class Bodies:
    """Reads them in one format. What is no call of a tool that was offered is Broken."""

    def __init__(
        self, form: ToolFormat, use: ToolUse, opened: Callable[[str], None], parts: list[str]
    ) -> None:
        """opened: is told the name of a call whose arguments a grammar keeps, and that come as JSON
        then; they are added to parts as they come."""
        self._form = form
        self._tools = {tool.name: tool for tool in use.offered}
        self._kept = use.kept
        self._opened = opened
        self._parts = parts
        self._types: dict[tuple[str, str], frozenset[str]] = {}
        """Of fields that were read."""

    def _open(self, name: str) -> None:
        if name not in self._tools:
            raise Broken
        self._opened(name)

    def read(self, first: str) -> Reading[list[CallPart]]:
        """What is between the markers, from its first character on; fields to their end."""
        try:
            if self._form.body == "named":
                name, char = yield from identifier(first)
                middle = self._form.middle.split()
                if middle:
                    yield from all_of(middle, first=char)
                first = yield from skip("" if middle else char)
                if self._kept and first == "{":
                    self._open(name)
                    yield from json_text(first, lambda char, *_: self._parts.append(char))
                    return [_END]
                return [self._call(name, load_json((yield from json_text(first))))]
            if self._form.fields is not None:
                return [(yield from self._field_call(first, self._form.fields))]
            if self._form.notation is not None:
                return [(yield from self._member_call(first, self._form.notation))]
            listed = self._form.body == "list"
            following = Following(self._form.keys, 1 + listed, self._open, self._parts)
            text = yield from json_text(first, following.see if self._kept else None)
            if following.found:
                return [_END]
            found = load_json(text)
            items = found if listed else [found]
            if not isinstance(items, list) or not items:
                raise Broken
            return [self._call(*_parts(item, self._form.keys)) for item in items]
        except (ValueError, RecursionError) as error:
            raise Broken from error

    def _field_call(self, first: str, style: FieldStyle) -> Reading[CallPart]:
        name, char = yield from identifier(first)
        tool = self._tools.get(name)
        if tool is None:
            raise Broken
        middle = self._form.middle.split()
        if middle:
            yield from all_of(middle, first=char)
            char = ""
        found: dict[str, Any] = {}
        choice = style.before.split(), self._form.frame.end.split()
        while (yield from one_of(*choice, first=char)) == 0:
            char = ""
            key = (yield from until(style.within.split())).strip()
            found[key] = yield from self._value(style, self._types_of(tool, key))
        return self._call(name, found)

    def _types_of(self, tool: Tool, key: str) -> frozenset[str]:
        if (tool.name, key) not in self._types:
            self._types[tool.name, key] = types_of(ways_of(tool.parameters, key))
        return self._types[tool.name, key]

    def _member_call(self, first: str, notation: Notation) -> Reading[CallPart]:
        name, char = yield from identifier(first)
        tool = self._tools.get(name)
        opener, closer = notation.brackets
        if tool is None or (yield from skip(char)) != opener:
            raise Broken
        members = Members(notation, partial(self._types_of, tool))
        return self._call(name, (yield from members.read((yield), closer)))

    def _value(self, style: FieldStyle, types: frozenset[str]) -> Reading[Any]:
        after = style.after.split()
        first = yield
        if not first:
            raise Broken
        if types and "string" not in types:
            first = yield from skip(first)
            if first and first in "{[":
                text = yield from json_text(first)
                yield from all_of(after)
                return read_value(text, types)
        text = yield from until(after, first=first)
        text = text.removeprefix("\n") if style.within.endswith("\n") else text
        text = text.removesuffix("\n") if style.after.startswith("\n") else text
        return read_value(text, types)

    def _call(self, name: object, arguments: object) -> CallPart:
        if not isinstance(name, str) or name not in self._tools:
            raise Broken
        return CallPart(name, written_object(arguments), True)


def _parts(value: object, keys: tuple[str, str]) -> tuple[object, object]:
    """Name and arguments; models mix up the usual words for those."""
    for name, arguments in (keys, *_KEYS):
        if isinstance(value, dict) and name in value and arguments in value:
            return value[name], value[arguments]
    raise Broken
