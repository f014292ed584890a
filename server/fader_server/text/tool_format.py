"""How a base writes calls of tools: facts, in the alphabet that streams of such answers have.

In it a special token of the format is one character that no UTF-8 text has, and an id another.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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

    body: Literal["object", "list", "named", "fields"]
    """A JSON object with name and arguments, a list of those, a name and a JSON object, or a name
    and fields; `frame` is around it."""
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

    @property
    def told(self) -> str:
        """The form in words, without its markers."""
        return {
            "object": "a JSON object a call",
            "list": "a JSON list of calls",
            "named": "a name and a JSON object a call",
            "fields": "a name and fields a call",
        }[self.body]

    @property
    def bare(self) -> bool:
        """No marker tells a call from text: an answer is one as a whole, or it has none."""
        return not self.frame.first.strip()

    def history(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A past answer with calls, whose arguments are objects, as the template takes it."""
        calls = message["tool_calls"]
        if self.text_arguments:
            calls = [with_text(call) for call in calls]
        return {**message, "tool_calls": calls}


def with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call with its arguments as text."""
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
