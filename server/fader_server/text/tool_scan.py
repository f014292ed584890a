"""Readings: parts of a text that take it character by character, so that it may come in any cuts.

A reading is a generator that is sent one character after the other, and "" when the text has ended.
Words are read with any white space, also none, before each.
"""

import re
from collections.abc import Callable, Generator
from typing import TypeVar

from fader_server.text.stops import StopMatcher
from fader_server.text.tool_format import CONTROL, ID

_Found = TypeVar("_Found")
Reading = Generator[None, str, _Found]
SILENT = dict.fromkeys((*CONTROL, ord(ID)))
"""Takes out of a text what stands for tokens that show none."""
_DEPTH = 64
_LONGEST = 64
"""Characters of a name."""


class Broken(Exception):
    """The last character does not belong to what is read."""


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


def one_of(*options: list[str], first: str = "", may_end: bool = False) -> Reading[int]:
    """Which of these sequences of words comes; -1: the text ends, as it may."""
    ways = {index: "\n" + "\n".join(words) for index, words in enumerate(options)}
    while True:
        char = first or (yield)
        first = ""
        if not char:
            if may_end:
                return -1
            raise Broken
        left = ((index, _after(rest, char)) for index, rest in ways.items())
        ways = {index: rest for index, rest in left if rest is not None}
        if not ways:
            raise Broken
        for index, rest in ways.items():
            if not rest:
                return index


def all_of(words: list[str], *, first: str = "", may_end: bool = False) -> Reading[None]:
    if words:
        yield from one_of(words, first=first, may_end=may_end)


def skip(first: str = "") -> Reading[str]:
    """The next character that is no white space."""
    char = first or (yield)
    while char.isspace():
        char = yield
    return char


def identifier(first: str) -> Reading[tuple[str, str]]:
    """A tool's name and what follows it."""
    name, char = "", first
    while char and (char.isalnum() or char in "_-."):
        name += char
        char = yield
    if not char or len(name) > _LONGEST:
        raise Broken
    return name, char


def until(words: list[str], *, first: str = "") -> Reading[str]:
    """The text before these words, which are read too."""
    found = StopMatcher(words[:1])
    text = ""
    while not found.stopped:
        char = first or (yield)
        first = ""
        if not char:
            raise Broken
        text += found.feed(char)
    yield from all_of(words[1:])
    return text


def json_text(first: str, seen: Callable[[str, int, bool], None] | None = None) -> Reading[str]:
    """A JSON object or list, from its first character to its last.

    seen: is told each as it comes, how deep it is in objects and lists then, and if in a text.
    """
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
            raise Broken
        if seen is not None:
            seen(char, len(closers), quoted)
        if not closers or len(closers) > _DEPTH:
            break
        char = yield
        if not char:
            raise Broken
        text += char
    if closers or not text.startswith(("{", "[")):
        raise Broken
    return text.translate(SILENT)


class Following:
    """Finds calls in JSON as it comes, whose keys a grammar has put in order."""

    def __init__(
        self,
        keys: tuple[str, str],
        depth: int,
        opened: Callable[[str], None],
        parts: list[str],
    ) -> None:
        """depth: of a call's own keys. opened: is told a call's name, parts: its arguments."""
        name, arguments = map(re.escape, keys)
        form = rf'"{name}"\s*:\s*"([^"\\]*)"\s*,\s*"{arguments}"\s*:$'
        self._head = re.compile(form)
        self._depth = depth
        self._opened = opened
        self._parts = parts
        self._before: list[str] = []
        self._inside = False
        self.found = False

    def see(self, char: str, depth: int, quoted: bool) -> None:
        """What `json_text` tells."""
        if self._inside:
            self._parts.append(char)
            self._inside = depth > self._depth
        elif char == "{" and not quoted and depth == self._depth + 1:
            head = self._head.search("".join(self._before).rstrip())
            self._before.clear()
            if head is not None:
                self._opened(head[1])
                self._parts.append(char)
                self._inside = self.found = True
        else:
            self._before.append(char)
