"""Chat messages: roles and text, checked. Knows nothing about templates or tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from fader_server.api.fields import Fields, is_text

Role = Literal["system", "developer", "user", "assistant", "tool"]
_ROLES = frozenset(get_args(Role))
_MOST = 4096


@dataclass(frozen=True, slots=True)
class Message:
    """One message; text parts are joined."""

    role: Role
    content: str


def read_messages(fields: Fields) -> tuple[Message, ...]:
    """The `messages` of a chat body; problems are noted in `fields`."""
    items = fields.array("messages", most=_MOST)
    if items is None:
        if fields.raw("messages") is None:
            fields.refuse("messages", "is required")
        return ()
    messages: list[Message] = []
    for item in items:
        problem = _problem(item)
        if problem:
            fields.refuse("messages", problem)
            return ()
        messages.append(Message(cast(Role, item["role"]), _text(item.get("content"))))
    return tuple(messages)


def plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    """As the text layer takes them."""
    return [{"role": message.role, "content": message.content} for message in messages]


def _problem(item: Any) -> str:  # noqa: ANN401 - any JSON value
    if not isinstance(item, dict) or type(item.get("role")) is not str:
        return "must be objects with role and content"
    if item["role"] not in _ROLES:
        return f"have roles out of {', '.join(sorted(_ROLES))} only"
    if item.get("tool_calls") or item.get("function_call"):
        return "with tool calls are not supported by this server"
    content = item.get("content")
    if is_text(content) or (content is None and item["role"] == "assistant"):
        return ""
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        return ""
    return "must have content that is text or a list of text parts"


def _is_text_part(part: Any) -> bool:  # noqa: ANN401 - any JSON value
    return isinstance(part, dict) and part.get("type") == "text" and is_text(part.get("text"))


def _text(content: str | list[dict[str, str]] | None) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""
