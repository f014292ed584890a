"""Chat messages: roles, text and past calls of tools, checked. Knows nothing about templates or
tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from fader_server.api.body import parse
from fader_server.api.fields import Fields, is_text
from fader_server.api.tools import NAME
from fader_server.errors import RequestInvalid

Role = Literal["system", "developer", "user", "assistant", "tool"]
_ROLES = frozenset(get_args(Role))
_MOST = 4096
_MOST_CALLS = 128
_MOST_ID = 256


@dataclass(frozen=True, slots=True)
class PastCall:
    """A call of a tool that an assistant made before."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One message; text parts are joined, and an assistant's refusal is what it said."""

    role: Role
    content: str
    calls: tuple[PastCall, ...] = ()
    """Of an assistant."""
    answers: str = ""
    """Of a tool: the id of the call that its content answers."""


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
        calls = [_call(call) for call in item.get("tool_calls") or ()]
        if None in calls:
            fields.refuse("messages", _CALLS)
            return ()
        messages.append(
            Message(
                cast(Role, item["role"]),
                _text(item.get("content")) or item.get("refusal") or "",
                tuple(call for call in calls if call is not None),
                item["tool_call_id"] if item["role"] == "tool" else "",
            )
        )
    return tuple(messages)


def plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As the text layer takes them; what a tool gave back has the name of the tool."""
    names: dict[str, str] = {}
    found: list[dict[str, Any]] = []
    for message in messages:
        fields: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.calls:
            fields["tool_calls"] = [_shown(call) for call in message.calls]
            names |= {call.id: call.name for call in message.calls}
        if message.answers:
            fields["tool_call_id"] = message.answers
            if message.answers in names:
                fields["name"] = names[message.answers]
        found.append(fields)
    return found


def _shown(call: PastCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


_CALLS = (
    "must have tool_calls that are objects with id, type function and function, an object with "
    "name and arguments, the text of a JSON object or none"
)


def _call(item: Any) -> PastCall | None:  # noqa: ANN401 - any JSON value
    """One of `tool_calls`; None: it is none."""
    function = item.get("function") if isinstance(item, dict) else None
    if not isinstance(function, dict) or item.get("type", "function") != "function":
        return None
    name, arguments = function.get("name"), function.get("arguments")
    if not _is_id(item.get("id")) or not isinstance(name, str) or not NAME.fullmatch(name):
        return None
    if not isinstance(arguments, str) or not is_text(arguments):
        return None
    try:
        return PastCall(item["id"], name, parse(arguments.encode() or b"{}"))
    except RequestInvalid:
        return None


def _is_id(value: object) -> bool:
    return is_text(value) and 0 < len(cast(str, value)) <= _MOST_ID


def _problem(item: Any) -> str:  # noqa: ANN401 - any JSON value
    if not isinstance(item, dict) or type(item.get("role")) is not str:
        return "must be objects with role and content"
    if item["role"] not in _ROLES:
        return f"have roles out of {', '.join(sorted(_ROLES))} only"
    if item.get("function_call"):
        return "with a function_call are not supported by this server: use tool_calls"
    calls = item.get("tool_calls")
    if calls and (item["role"] != "assistant" or not isinstance(calls, list)):
        return "may have tool_calls, a list, of an assistant only"
    if calls and len(calls) > _MOST_CALLS:
        return f"may have at most {_MOST_CALLS} tool_calls"
    if item["role"] == "tool" and not _is_id(item.get("tool_call_id")):
        return f"of a tool need tool_call_id, text of 1 to {_MOST_ID} characters"
    content, refusal = item.get("content"), item.get("refusal")
    if refusal is not None and not (item["role"] == "assistant" and is_text(refusal)):
        return "may have a refusal, text, of an assistant only"
    kinds = ("text", "refusal") if item["role"] == "assistant" else ("text",)
    if is_text(content) or (content is None and item["role"] == "assistant"):
        return ""
    if isinstance(content, list) and content and all(_is_part(part, kinds) for part in content):
        return ""
    return "must have content that is text or a list of text parts"


def _is_part(part: Any, kinds: Sequence[str]) -> bool:  # noqa: ANN401 - any JSON value
    """Whether it has its text in the field that is called as its type."""
    return isinstance(part, dict) and part.get("type") in kinds and is_text(part.get(part["type"]))


def _text(content: str | list[dict[str, str]] | None) -> str:
    if isinstance(content, list):
        return "".join(part[part["type"]] for part in content)
    return content or ""
