"""`input` and `instructions` of a response: OpenAI's items to the messages of a chat.

Knows which items make one message; what a message may say is judged as in chats.
"""

from collections.abc import Callable, Mapping
from typing import Any

from fader_server.api.fields import Fields, is_text
from fader_server.api.past_calls import MAX_ID, is_id
from fader_server.api.pieces import Json
from fader_server.api.responses.tools import type_of
from fader_server.api.tools import NAME

_MOST = 4096
_LEADS = ("system", "developer")
_UNKNOWN = (
    "must be a message with role and content, a function_call, a function_call_output or a "
    "reasoning item"
)
_THOUGHTS = "rs_"
"""What ids of reasoning items begin with."""
_REFERENCE = (
    "refers to an item by its id: none is kept here, send the item itself (as Vercel's AI SDK does "
    "with store: false)"
)
_CALL = (
    "needs a name of up to 64 letters, digits, _ and -, arguments that are text, and a call_id of "
    f"1 to {MAX_ID} characters"
)
_RESULT = f"needs a call_id of 1 to {MAX_ID} characters and output, text or a list of text parts"


def read_input(fields: Fields) -> tuple[list[Json], list[int]]:
    """Messages in the shape of a chat, and for each the number of the item that it is of. Problems
    are noted in `fields`."""
    value = fields.raw("input")
    items = [{"role": "user", "content": value}] if isinstance(value, str) else value
    chat = _Chat()
    if value is None:
        fields.refuse("input", "is required")
    elif not isinstance(items, list) or not 1 <= len(items) <= _MOST:
        fields.refuse("input", f"must be text or a list of 1 to {_MOST} items")
    else:
        for at, item in enumerate(items):
            problem = chat.add(at, item)
            if problem:
                fields.refuse("input", problem, inside=f"[{at}]")
                break
    told = [(one, at) for one, at in chat.messages if not _is_bare_thought(one)]
    instructions = fields.string("instructions")
    if instructions:
        told.insert(0, ({"role": "system", "content": instructions}, 0))
    told = _led(told)
    return [one for one, _ in told], [at for _, at in told]


class _Chat:
    """Grows item by item."""

    def __init__(self) -> None:
        self.messages: list[tuple[Json, int]] = []
        self._said: Json | None = None
        """The assistant's message at the end, which further items may be of."""
        self._adds: Mapping[str, Callable[[int, Json], str]] = {
            "message": self._message,
            "function_call": self._call,
            "function_call_output": self._result,
            "reasoning": self._thought,
        }

    def add(self, at: int, item: Any) -> str:  # noqa: ANN401 - any JSON value
        """What is wrong with the item; empty: nothing that the messages do not show."""
        if not isinstance(item, dict):
            return _UNKNOWN
        kind = type_of(item)
        if item.get("type") is None:
            kind = "item_reference" if "id" in item and "role" not in item else "message"
        if kind == "item_reference":
            return self._reference(item)
        add = self._adds.get(kind)
        if add is None:
            return f"is of type {kind}, which is not supported here" if kind else _UNKNOWN
        return add(at, item)

    def _reference(self, item: Json) -> str:
        """A thought is not missed: most templates leave out past ones anyway."""
        id = item.get("id")
        return "" if isinstance(id, str) and id.startswith(_THOUGHTS) else _REFERENCE

    def _message(self, at: int, item: Json) -> str:
        message = {"role": item.get("role"), "content": item.get("content")}
        if message["role"] == "assistant":
            self._assistant(at, unless=("content",))["content"] = message["content"]
        else:
            self._append(at, message)
        return ""

    def _call(self, at: int, item: Json) -> str:
        name, arguments = item.get("name"), item.get("arguments")
        named = isinstance(name, str) and NAME.fullmatch(name)
        if not (named and is_id(item.get("call_id")) and isinstance(arguments, str | None)):
            return _CALL
        function = {"name": name, "arguments": arguments}
        call = {"id": item["call_id"], "type": "function", "function": function}
        self._assistant(at).setdefault("tool_calls", []).append(call)
        return ""

    def _result(self, at: int, item: Json) -> str:
        id, output = item.get("call_id"), item.get("output")
        if not is_id(id) or not isinstance(output, str | list):
            return _RESULT
        self._append(at, {"role": "tool", "tool_call_id": id, "content": output})
        return ""

    def _thought(self, at: int, item: Json) -> str:
        """Its text, or the summary where there is none; a thought that is told as neither has no
        place in a chat."""
        told = (_texts(item.get(name)) for name in ("content", "summary"))
        thought = next((text for text in told if text), "")
        if thought:
            said = self._assistant(at, unless=("content", "tool_calls"))
            said["reasoning_content"] = "\n".join(
                filter(None, (said.get("reasoning_content"), thought))
            )
        return ""

    def _append(self, at: int, message: Json) -> None:
        self.messages.append((message, at))
        self._said = message if message["role"] == "assistant" else None

    def _assistant(self, at: int, unless: tuple[str, ...] = ()) -> Json:
        """The message that an item of an assistant is of: a new one if that at the end has any of
        these fields."""
        if self._said is None or any(self._said.get(name) is not None for name in unless):
            self._append(at, {"role": "assistant"})
        assert self._said is not None
        self.messages[-1] = self._said, at
        return self._said


def _texts(parts: object) -> str:
    found = (part.get("text") for part in _list(parts) if isinstance(part, dict))
    return "\n".join(text for text in found if isinstance(text, str) and is_text(text))


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_bare_thought(message: Json) -> bool:
    """An assistant that only thought: nothing came of it."""
    has = ("content" in message, "tool_calls" in message)
    return message["role"] == "assistant" and not any(has)


def _led(told: list[tuple[Json, int]]) -> list[tuple[Json, int]]:
    """With what systems and developers say at the beginning in one message: many templates take no
    second one."""
    leads: list[tuple[Json, int]] = []
    for message, at in told:
        if message["role"] not in _LEADS or not isinstance(message["content"], str | list):
            break
        leads.append((message, at))
    if len(leads) < 2:
        return told
    parts: list[Any] = []
    for message, _ in leads:
        content = message["content"]
        parts += ["\n\n"] if parts else []
        parts += [content] if isinstance(content, str) else content
    first, _ = leads[0]
    return [({"role": first["role"], "content": parts}, leads[-1][1]), *told[len(leads) :]]
