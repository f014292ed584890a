"""The rules of one grammar of calls, in the grammar library's words. Knows no format."""

import json
from collections.abc import Mapping
from typing import Any

from fader_server.errors import RequestInvalid
from fader_server.text.grammar import HEAD, json_rule
from fader_server.text.tool_format import CONTROL, ID
from fader_server.text.tools import Tool

_STANDING = frozenset((*CONTROL, ord(ID)))
_ANY = {"type": "object"}


class Rules:
    """Collects them."""

    def __init__(self, *, must: bool, controls: Mapping[str, int]) -> None:
        """must: the answer is a call. controls: token ids of characters that stand for them."""
        self._must = must
        self._controls = controls
        self._lines = [r"ID: /[a-zA-Z0-9]{9}/", r"TEXT: /(.|\n)*/"]

    def text(self, *rules: str) -> str:
        """The grammar; the first of the given rules is its start."""
        return HEAD + "\n".join([*rules, *self._lines]) + "\n"

    def rule(self, name: str, body: str) -> str:
        """Its name."""
        self._lines.append(f"{name}: {body}")
        return name

    def json(self, name: str, schema: Mapping[str, Any], tool: Tool) -> str:
        """A rule for JSON of a schema: to the letter where the tool is strict."""
        return self.rule(name, json_rule(json.dumps(schema), lenient=not tool.strict))

    def arguments(self, name: str, tool: Tool) -> str:
        """A rule for the JSON object of a tool's arguments."""
        return self.json(name, tool.parameters if self._must or tool.strict else _ANY, tool)

    def literal(self, text: str) -> str:
        """This text, with what stands for special tokens and ids."""
        parts: list[str] = []
        while text:
            size = plain_length(text)
            if size:
                parts.append(json.dumps(text[:size]))
            elif text[0] == ID:
                parts.append("ID")
            else:
                parts.append(f"<[{self._controls[text[0]]}]>")
            text = text[max(size, 1) :]
        return " ".join(parts)


def plain_length(text: str) -> int:
    """Characters before the first that stands for a special token or an id."""
    return next((at for at, char in enumerate(text) if ord(char) in _STANDING), len(text))


def unwritable(tool: Tool) -> RequestInvalid:
    """A format cannot say what the tool's parameters ask for."""
    at = "strict parameters" if tool.strict else "parameters"
    return RequestInvalid(
        f"has a tool with {at} that cannot be enforced in the way this model writes calls",
        param="tools",
    )
