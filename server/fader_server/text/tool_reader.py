"""Calls of tools in the text of an answer, as it comes. Knows no tokens and no stop strings.

Text that begins like a call is one when it is whole, names a tool that was offered and has a JSON
object of arguments; it is content else, to the place where it breaks, and reading goes on there:
nothing is read twice. White space beside a call is no content. What the arguments' schema asks is
left to the grammar of the answer, where it has one.
"""

import json
from collections.abc import Generator
from typing import Any, TypeVar

from fader_server.text.stops import StopMatcher
from fader_server.text.tool_format import CONTROL, ID, FieldStyle, ToolFormat
from fader_server.text.tool_values import read_value, types_of, ways_of
from fader_server.text.tools import ToolCall, ToolUse

Piece = str | ToolCall
_Found = TypeVar("_Found")
_Reading = Generator[None, str, _Found]
"""Takes the text character by character, "" at its end."""
_DEPTH = 64
_SILENT = dict.fromkeys((*CONTROL, ord(ID)))
_KEYS = ("name", "arguments"), ("name", "parameters")


class _Broken(Exception):
    """No call: the last character does not belong to it."""


class CallReader:
    """The same pieces, however the text is cut."""

    def __init__(self, form: ToolFormat, use: ToolUse) -> None:
        self._form = form
        self._tools = {tool.name: tool for tool in use.offered}
        self._pieces: list[Piece] = []
        self._space = ""
        """White space that is content unless a call follows."""
        self._after_call = False
        self._held: list[str] = []
        """What may be a call."""
        self._reading: _Reading[None] | None = None
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
        self._say(self._text.flush())
        self._tell(self._space)
        return self._told()

    def _tell(self, text: str) -> None:
        if self._pieces and isinstance(self._pieces[-1], str):
            self._pieces[-1] += text
        elif text:
            self._pieces.append(text)

    def _told(self) -> list[Piece]:
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
        except _Broken:
            self._held.pop()
            broken, self._held = "".join(self._held), []
            self._look()
            self._say(broken)
            if char:
                self._take(char)

    def _look(self) -> None:
        """For the marker that begins a call."""
        self._reading = None
        words = self._form.frame.first.split()
        self._trigger = words[0] if words else ""
        self._text = StopMatcher([self._trigger] if self._trigger else ())

    def _begin(self, reading: _Reading[None], *held: str) -> None:
        self._held = list(held)
        self._reading = reading
        next(reading)

    def _say(self, text: str) -> None:
        """As content, without what stands for tokens that show no text."""
        text = self._space + text.translate(_SILENT)
        if self._after_call:
            text = text.lstrip()
        whole = text.rstrip()
        self._space = text[len(whole) :]
        if whole:
            self._after_call = False
            self._tell(whole)

    def _made(self, calls: list[ToolCall]) -> None:
        self._space = ""
        self._after_call = True
        self._held.clear()
        self._pieces.extend(calls)

    def _bare(self) -> _Reading[None]:
        """The answer as a whole."""
        calls = yield from self._body((yield from _skip()))
        while char := (yield):
            if not char.isspace():
                raise _Broken
        self._made(calls)

    def _marked(self) -> _Reading[None]:
        """Calls behind a marker that is read already."""
        frame, body = self._form.frame, self._form.body
        yield from _words(frame.first.split()[1:])
        first = yield from _skip()
        while True:
            calls = yield from self._body(first)
            if body != "fields":
                yield from _words(frame.end.split(), may_end=True)
            self._made(calls)
            if frame.single:
                return
            again = frame.again.split()
            if (yield from _either(again or ["{"], frame.last.split())) == 1:
                self._held.clear()
                return
            first = (yield from _skip()) if again else "{"

    def _body(self, first: str) -> _Reading[list[ToolCall]]:
        """What is between the markers, from its first character on; fields to their end."""
        try:
            if self._form.body == "named":
                name, char = yield from _name(first)
                middle = self._form.middle.split()
                if middle:
                    yield from _words(middle, first=char)
                text = yield from _json((yield from _skip("" if middle else char)))
                return [self._call(name, _loaded(text))]
            if self._form.fields is not None:
                return [(yield from self._field_call(first, self._form.fields))]
            found = _loaded((yield from _json(first)))
            items = found if self._form.body == "list" else [found]
            if not isinstance(items, list) or not items:
                raise _Broken
            return [self._call(*_parts(item, self._form.keys)) for item in items]
        except ValueError as error:
            raise _Broken from error

    def _field_call(self, first: str, style: FieldStyle) -> _Reading[ToolCall]:
        name, char = yield from _name(first)
        tool = self._tools.get(name)
        if tool is None:
            raise _Broken
        middle = self._form.middle.split()
        if middle:
            yield from _words(middle, first=char)
            char = ""
        found: dict[str, Any] = {}
        choice = style.before.split(), self._form.frame.end.split()
        while (yield from _either(*choice, first=char)) == 0:
            char = ""
            key = (yield from _until(style.within.split())).strip()
            ways = map(types_of, ways_of(tool.parameters, key))
            found[key] = yield from self._value(style, frozenset().union(*ways))
        return self._call(name, found)

    def _value(self, style: FieldStyle, types: frozenset[str]) -> _Reading[Any]:
        after = style.after.split()
        first = yield
        if not first:
            raise _Broken
        if types and "string" not in types:
            first = yield from _skip(first)
            if first and first in "{[":
                text = yield from _json(first)
                yield from _words(after)
                return read_value(text, types)
        text = yield from _until(after, first=first)
        text = text.removeprefix("\n") if style.within.endswith("\n") else text
        text = text.removesuffix("\n") if style.after.startswith("\n") else text
        return read_value(text, types)

    def _call(self, name: object, arguments: object) -> ToolCall:
        if not isinstance(name, str) or name not in self._tools or not isinstance(arguments, dict):
            raise _Broken
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode()
        return ToolCall(name, text)


def _after(rest: str, char: str) -> str | None:
    """What is still to come of a text, whose line breaks are any white space and may be missing."""
    if rest[0] == "\n":
        if char.isspace():
            return rest
        rest = rest[1:]
    if rest[0] == ID:
        if char.isalnum() or char in "_-":
            return rest
        rest = rest[1:]
    return rest[1:] if rest.startswith(char) else None


def _either(*options: list[str], first: str = "", may_end: bool = False) -> _Reading[int]:
    """Which of these sequences of words comes."""
    ways = {index: "\n" + "\n".join(words) for index, words in enumerate(options)}
    while True:
        char = first or (yield)
        first = ""
        if not char:
            if may_end:
                return 0
            raise _Broken
        left = ((index, _after(rest, char)) for index, rest in ways.items())
        ways = {index: rest for index, rest in left if rest is not None}
        if not ways:
            raise _Broken
        for index, rest in ways.items():
            if not rest:
                return index


def _words(words: list[str], *, first: str = "", may_end: bool = False) -> _Reading[None]:
    if words:
        yield from _either(words, first=first, may_end=may_end)


def _skip(first: str = "") -> _Reading[str]:
    """The next character that is no white space."""
    char = first or (yield)
    while char.isspace():
        char = yield
    return char


def _name(first: str) -> _Reading[tuple[str, str]]:
    """A tool's name and what follows it."""
    name, char = "", first
    while char and (char.isalnum() or char in "_-."):
        name += char
        char = yield
    if not char:
        raise _Broken
    return name, char


def _until(words: list[str], *, first: str = "") -> _Reading[str]:
    """The text before these words, which are read too."""
    found = StopMatcher(words[:1])
    text = ""
    while not found.stopped:
        char = first or (yield)
        first = ""
        if not char:
            raise _Broken
        text += found.feed(char)
    yield from _words(words[1:])
    return text


def _json(first: str) -> _Reading[str]:
    """A JSON object or list, from its first character to its last."""
    text, closers, quoted, escaped = first, [], False, False
    char = first
    while True:
        if quoted:
            quoted = escaped or char != '"'
            escaped = not escaped and char == "\\"
        elif char == '"':
            quoted = True
        elif char and char in "{[":
            closers.append("}" if char == "{" else "]")
        elif char and char in "}]" and (not closers or closers.pop() != char):
            raise _Broken
        if not closers or len(closers) > _DEPTH:
            break
        char = yield
        if not char:
            raise _Broken
        text += char
    if closers or not text.startswith(("{", "[")):
        raise _Broken
    return text.translate(_SILENT)


def _loaded(text: str) -> Any:  # noqa: ANN401 - any JSON value
    return json.loads(text, strict=False, parse_constant=_refuse)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _parts(value: object, keys: tuple[str, str]) -> tuple[object, object]:
    """Name and arguments; models mix up the usual words for those."""
    for name, arguments in (keys, *_KEYS):
        if isinstance(value, dict) and name in value and arguments in value:
            return value[name], value[arguments]
    raise _Broken
