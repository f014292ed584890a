"""Calls of tools in the text of an answer, as it comes. Knows no tokens and no stop strings.

Text that begins like a call is one when it is whole, names a tool that was offered and has a JSON
object of arguments; it is content else, to the place where it breaks, and reading goes on there:
nothing is read twice. White space beside a call is no content. What the arguments' schema asks is
left to the grammar of the answer. Where it has one, calls break only where an answer is cut: JSON
of arguments is told as it comes, and what a cut leaves of a call beside is nothing.
"""

import json
import re
from typing import Any

from fader_server.text.stops import StopMatcher
from fader_server.text.tool_format import FieldStyle, ToolFormat
from fader_server.text.tool_scan import (
    SILENT,
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
from fader_server.text.tool_values import load_json, read_value, types_of, ways_of
from fader_server.text.tools import CallPart, ToolUse

Piece = str | CallPart
_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character, which JSON can write but UTF-8 cannot."""
_KEYS = ("name", "arguments"), ("name", "parameters")
_END = CallPart("", "", True)


class CallReader:
    """The same pieces, however the text is cut."""

    def __init__(self, form: ToolFormat, use: ToolUse) -> None:
        self._form = form
        self._tools = {tool.name: tool for tool in use.offered}
        self._kept, self._must = use.kept, use.must
        self._parts: list[str] = []
        """Of arguments that are told as they come."""
        self._types: dict[tuple[str, str], frozenset[str]] = {}
        """Of fields that were read."""
        self._pieces: list[Piece] = []
        self._space: list[str] = []
        """White space that is content unless a call follows."""
        self._after_call = False
        self._held: list[str] = []
        """What may be a call."""
        self._reading: Reading[None] | None = None
        self._text = StopMatcher(())
        if form.bare:
            self._begin(self._bare())
        else:
            self._look()

    def feed(self, text: str) -> list[Piece]:
        """Content and calls that are certain now, in order."""
        for char in text:
            self._take(char)
        return self._told()

    def finish(self) -> list[Piece]:
        """The rest, when no more text comes."""
        if self._reading is not None:
            self._take("")
        if not self._must:  # else it is what a cut left of a marker
            self._say(self._text.flush())
            self._tell("".join(self._space))
        return self._told()

    def _tell(self, text: str) -> None:
        if self._pieces and isinstance(self._pieces[-1], str):
            self._pieces[-1] += text
        elif text:
            self._pieces.append(text)

    def _told(self) -> list[Piece]:
        self._tell_parts()
        told, self._pieces = self._pieces, []
        return told

    def _take(self, char: str) -> None:
        if self._reading is None:
            self._say(self._text.feed(char))
            if self._text.stopped:
                self._begin(self._marked(), *self._trigger)
            return
        try:
            self._held.append(char)
            self._reading.send(char)
        except StopIteration:
            self._held.clear()
            self._look()
        except Broken:
            self._held.pop()
            broken, self._held = "".join(self._held), []
            self._look()
            if char or not self._kept:
                self._say(broken)
            if char:
                self._take(char)

    def _look(self) -> None:
        """For the marker that begins a call."""
        self._reading = None
        words = self._form.frame.first.split()
        self._trigger = words[0] if words else ""
        self._text = StopMatcher([self._trigger] if self._trigger else ())

    def _begin(self, reading: Reading[None], *held: str) -> None:
        self._held = list(held)
        self._reading = reading
        next(reading)

    def _say(self, text: str) -> None:
        """As content, without what stands for tokens that show no text."""
        text = text.translate(SILENT)
        if self._after_call:
            text = text.lstrip()
        whole = text.rstrip()
        if whole:
            self._after_call = False
            self._tell("".join(self._space) + whole)
            self._space.clear()
        self._space.append(text[len(whole) :])

    def _begun(self) -> None:
        self._space.clear()
        self._after_call = True

    def _made(self, calls: list[CallPart]) -> None:
        self._begun()
        self._held.clear()
        self._tell_parts()
        self._pieces.extend(calls)

    def _opened(self, name: str) -> None:
        """A call begins whose arguments are told as they come."""
        if name not in self._tools:
            raise Broken
        self._begun()
        self._tell_parts()
        self._pieces.append(CallPart(name, "", False))

    def _tell_parts(self) -> None:
        if self._parts:
            self._pieces.append(CallPart("", "".join(self._parts), False))
            self._parts.clear()

    def _bare(self) -> Reading[None]:
        """The answer as a whole."""
        calls = yield from self._body((yield from skip()))
        while char := (yield):
            if not char.isspace():
                raise Broken
        self._made(calls)

    def _marked(self) -> Reading[None]:
        """Calls behind a marker that is read already."""
        frame, body = self._form.frame, self._form.body
        yield from all_of(frame.first.split()[1:])
        first = yield from skip()
        while True:
            calls = yield from self._body(first)
            if body != "fields":
                yield from all_of(frame.end.split(), may_end=True)
            self._made(calls)
            if frame.single:
                return
            again, last = frame.again.split(), frame.last.split()
            if (yield from one_of(again or ["{"], *([last] if last else []))) == 1:
                self._held.clear()
                return
            first = (yield from skip()) if again else "{"

    def _body(self, first: str) -> Reading[list[CallPart]]:
        """What is between the markers, from its first character on; fields to their end."""
        try:
            if self._form.body == "named":
                name, char = yield from identifier(first)
                middle = self._form.middle.split()
                if middle:
                    yield from all_of(middle, first=char)
                first = yield from skip("" if middle else char)
                if self._kept and first == "{":
                    self._opened(name)
                    yield from json_text(first, lambda char, *_: self._parts.append(char))
                    return [_END]
                return [self._call(name, load_json((yield from json_text(first))))]
            if self._form.fields is not None:
                return [(yield from self._field_call(first, self._form.fields))]
            listed = self._form.body == "list"
            following = Following(self._form.keys, 1 + listed, self._opened, self._parts)
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
            if (name, key) not in self._types:
                self._types[name, key] = types_of(ways_of(tool.parameters, key))
            found[key] = yield from self._value(style, self._types[name, key])
        return self._call(name, found)

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
        if not isinstance(name, str) or name not in self._tools or not isinstance(arguments, dict):
            raise Broken
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        if not text.isascii() and _SURROGATE.search(text):
            text = json.dumps(arguments)
        return CallPart(name, text, True)


def _parts(value: object, keys: tuple[str, str]) -> tuple[object, object]:
    """Name and arguments; models mix up the usual words for those."""
    for name, arguments in (keys, *_KEYS):
        if isinstance(value, dict) and name in value and arguments in value:
            return value[name], value[arguments]
    raise Broken
