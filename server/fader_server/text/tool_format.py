"""How a base writes calls of tools: facts, in the alphabet that streams of such answers have.

In it a special token of the format is one character that no UTF-8 text has, and an id another.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fader_server.text.notation import Notation

CONTROL = range(0xD800, 0xDF00)
"""Lone surrogates: characters for special tokens."""
ID = "\udfff"
"""Stands where a call's id is written."""


@dataclass(frozen=True, slots=True)
class FieldStyle:
    """Arguments one by one: `before` key `within` value `after`."""

    before: str
    within: str
    after: str


@dataclass(frozen=True, slots=True)
class Frame:
    """What is around calls, to read them by: any white space will do where it has some."""

    first: str
    """Before the first."""
    end: str
    """Behind each."""
    again: str
    """After that, before the next."""
    last: str
    """After that, behind the last."""

    @property
    def single(self) -> bool:
        """Each call stands for itself."""
        return not self.last.strip() and (
            not self.again or self.again.split() == self.first.split()
        )


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """An answer is written as opening, name, middle, arguments, then closing, or between and the
    next name, and so on."""

    body: Literal["object", "list", "named", "fields", "members"]
    """A JSON object with name and arguments, a list of those, a name and a JSON object, a name and
    fields, or a name and members; `frame` is around it."""
    opening: str
    middle: str
    between: str | None
    """None: one call in an answer."""
    closing: str
    frame: Frame
    text_arguments: bool
    """In a history the template takes arguments as the text of a JSON object."""
    controls: Mapping[str, int]
    """Token ids of the characters that stand for special tokens."""
    keys: tuple[str, str] = ("", "")
    """Of the name and the arguments in a JSON object."""
    fields: FieldStyle | None = None
    """Of a body of fields."""
    notation: Notation | None = None
    """Of a body of members."""
    spelled: Mapping[str, str] | None = None
    """Names of its special tokens, where the template writes no calls: they are content there."""

    @property
    def told(self) -> str:
        """The form in words, without its markers."""
        return {
            "object": "a JSON object a call",
            "list": "a JSON list of calls",
            "named": "a name and a JSON object a call",
            "fields": "a name and fields a call",
            "members": "a name and members in brackets a call",
        }[self.body]

    @property
    def bare(self) -> bool:
        """No marker tells a call from text: an answer is one as a whole, or it has none."""
        first = self.frame.first.strip()
        return not first or (self.notation is not None and first == "[")

    def history(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A past answer with calls, whose arguments are objects, as the template takes it."""
        calls = message["tool_calls"]
        if self.spelled is not None:
            said = message["content"] + self._written([call["function"] for call in calls])
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            return {**rest, "content": said}
        if self.text_arguments:
            calls = [with_text(call) for call in calls]
        return {**message, "tool_calls": calls}

    def _written(self, functions: list[Mapping[str, Any]]) -> str:
        assert self.notation is not None
        names = str.maketrans(dict(self.spelled or {}))
        each = [f["name"] + self.notation.arguments(f["arguments"]) for f in functions]
        between = (self.between or "").translate(names)
        return self.opening.translate(names) + between.join(each) + self.closing.translate(names)


def with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call with its arguments as text."""
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
