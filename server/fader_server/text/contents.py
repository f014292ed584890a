"""What the messages of a chat say: their texts, their length, ids of calls that any template takes.

Knows no template and no tokens.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fader_server.errors import RequestInvalid
from fader_server.text.controls import strings
from fader_server.text.tools import Tool

_SHORT = re.compile(r"[A-Za-z0-9]{9}", re.ASCII)
"""The only ids of calls that some templates, Mistral's, take."""


def text_of(content: object, at: int) -> str:
    """The text of the content of message number `at`. Raises RequestInvalid."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    raise RequestInvalid("expected a string", param=f"messages[{at}].content")


def characters(messages: Iterable[Mapping[str, Any]], tools: Iterable[Tool] = ()) -> int:
    """Characters of all contents, calls and tools, before anything is rendered."""
    offered = sum(len(text) for tool in tools for text in strings(tool.shown))
    return offered + sum(
        len(text_of(message.get("content"), at))
        + len(message.get("reasoning_content", ""))
        + sum(map(len, strings(message.get("tool_calls", ()))))
        for at, message in enumerate(messages)
    )


def with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    """With ids of calls that every template takes."""
    found = dict(message)
    if "tool_calls" in found:
        found["tool_calls"] = [c | {"id": _short(c["id"])} for c in found["tool_calls"]]
    if "tool_call_id" in found:
        found["tool_call_id"] = _short(found["tool_call_id"])
    return found


def _short(id: str) -> str:
    """The id where it has nine letters and digits, else such an id of its own."""
    return id if _SHORT.fullmatch(id) else hashlib.sha256(id.encode()).hexdigest()[:9]
