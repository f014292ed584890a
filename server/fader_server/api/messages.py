"""Chat messages: roles, text and past calls of tools, in the shapes that clients send, checked.
Knows nothing about templates or tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fader_server.api.fields import Fields, is_text
from fader_server.api.past_calls import CALLS, MAX_ID, UNSET, PastCall, is_id, read_call
from fader_server.text.roles import ROLES, Role

_MOST = 4096
_MOST_CALLS = 128
_TEXTS = ("text", "input_text", "output_text")
_MEDIA = (
    *("image_url", "input_image", "image", "video_url", "input_video", "video"),
    *("input_audio", "audio_url", "audio"),
)
_FILES = ("file", "input_file")


@dataclass(frozen=True, slots=True)
class Message:
    """One message; text parts are joined, and an assistant's refusal is what it said."""

    role: Role
    content: str
    calls: tuple[PastCall, ...] = ()
    """Of an assistant."""
    answers: str = ""
    """Of a tool: the id of the call that its content answers."""
    thought: str = ""
    """Of an assistant: what it thought before it said so."""
    prefix: bool = False
    """Of an assistant: the answer goes on with it."""


def read_messages(fields: Fields) -> tuple[Message, ...]:
    """The `messages` of a chat body; problems are noted in `fields`."""
    items = fields.array("messages", most=_MOST)
    if items is None:
        if fields.raw("messages") is None:
            fields.refuse("messages", "is required")
        return ()
    messages: list[Message] = []
    unanswered: set[str] = set()
    for at, item in enumerate(items):
        message = _problem(item) or _message(item, at, unanswered)
        if isinstance(message, str):
            fields.refuse("messages", message, inside=f"[{at}]")
            return ()
        messages.append(message)
    return tuple(messages)


def _message(item: dict[str, Any], at: int, unanswered: set[str]) -> Message | str:
    """One without a problem of its own; a text says what is wrong.

    unanswered: ids of the calls before it that no message of a tool answers; it is kept so.
    """
    calls: list[PastCall] = []
    for number, given in enumerate(item.get("tool_calls") or ()):
        # Nine digits: an id that all templates take, and the same when the chat goes on.
        call = read_call(given, f"{at:05}{number:04}")
        if call is None:
            return CALLS
        calls.append(call)
    answers = ""
    if item["role"] == "tool":
        only = next(iter(unanswered)) if len(unanswered) == 1 else ""
        answers = item.get("tool_call_id") or only
        if not answers:
            return "of a tool needs tool_call_id: not exactly one call before it is unanswered"
    unanswered.discard(answers)
    unanswered.update(call.id for call in calls)
    text = _text(item.get("content"), item["role"]) or item.get("refusal") or ""
    thought = _thought(item) if item["role"] == "assistant" else ""
    prefix = item["role"] == "assistant" and item.get("prefix") is True
    return Message(item["role"], text, tuple(calls), answers, thought, prefix)


def _thought(item: dict[str, Any]) -> str:
    """In the fields that servers tell it in; what is no text there is none."""
    told = (item.get(name) for name in ("reasoning_content", "reasoning"))
    return next((text for text in told if text and is_text(text)), "")


def plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As the text layer takes them; what a tool gave back has the name of the tool."""
    names: dict[str, str] = {}
    found: list[dict[str, Any]] = []
    for message in messages:
        fields: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.thought:
            fields["reasoning_content"] = message.thought
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


def _problem(item: Any) -> str:  # noqa: ANN401 - any JSON value
    """What is wrong with one of `messages`, whatever the others are."""
    if not isinstance(item, dict) or type(item.get("role")) is not str:
        return "must be an object with role and content"
    role = item["role"]
    if role not in ROLES:
        return f"must have a role out of {', '.join(sorted(ROLES))}"
    if item.get("function_call"):
        return "has a function_call, which is not supported by this server: use tool_calls"
    calls = item.get("tool_calls")
    if calls and (role != "assistant" or not isinstance(calls, list)):
        return "may have tool_calls, a list, if it is of an assistant"
    if calls and len(calls) > _MOST_CALLS:
        return f"may have at most {_MOST_CALLS} tool_calls"
    answered = item.get("tool_call_id")
    if role == "tool" and answered not in UNSET and not is_id(answered):
        return f"has a tool_call_id that is not text of 1 to {MAX_ID} characters"
    refusal = item.get("refusal")
    if refusal is not None and not (role == "assistant" and is_text(refusal)):
        return "may have a refusal, text, if it is of an assistant"
    return _problem_of_content(item.get("content"), role)


def _problem_of_content(content: Any, role: str) -> str:  # noqa: ANN401 - any JSON value
    kinds = [part.get("type") for part in _parts(content) if isinstance(part, dict)]
    if any(kind in _MEDIA for kind in kinds):
        return "has a picture or sound: pictures and sound are not supported by this server"
    if any(kind in _FILES for kind in kinds):
        return "has a file: files are not supported by this server"
    texts = [part.get("text") if isinstance(part, dict) else part for part in _parts(content)]
    if any(isinstance(text, str) and not is_text(text) for text in (content, *texts)):
        return "must have content that is text: half of a surrogate pair is none"
    nothing = role == "user" and content in (None, [])
    if nothing or _text(content, role) is None:
        return "must have content that is text or a list of text parts"
    return ""


def _parts(content: object) -> Sequence[object]:
    return content if isinstance(content, list) else ()


def _text(content: object, role: str) -> str | None:
    """The text of a content, of its parts together; None: it has other things."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content if isinstance(content, str) and is_text(content) else None
    texts = [_text_of_part(part, role) for part in content]
    kept = [text for text in texts if text is not None]
    return "".join(kept) if len(kept) == len(texts) else None


def _text_of_part(part: object, role: str) -> str | None:
    if isinstance(part, dict):
        kind = part.get("type")
        if kind == "thinking":  # templates have no place for what an earlier answer thought
            return ""
        if kind in _TEXTS or (kind == "refusal" and role == "assistant"):
            part = part.get("refusal" if kind == "refusal" else "text")
    return part if isinstance(part, str) and is_text(part) else None
