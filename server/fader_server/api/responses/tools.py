"""`tools` and `tool_choice` of a response, which name their functions one level further up than a
chat does. Judges forms that a chat cannot have, no more."""

import re
from typing import Any

from fader_server.api.fields import Fields
from fader_server.api.pieces import Json

_TYPE = re.compile(r"[a-z0-9_]{1,40}", re.ASCII)
_CHOICES = (
    'must be none, auto, required, {"type": "function", "name": …} or {"type": "allowed_tools", '
    '"mode": "auto" or "required", "tools": […]}'
)
_KEYS = ("name", "description", "parameters", "strict")


def read_offer(fields: Fields) -> Any:  # noqa: ANN401 - any JSON value
    """As a chat has them; what are no tools is left as it is."""
    value = fields.raw("tools")
    if not isinstance(value, list):
        return value
    for item in value:
        kind = type_of(item)
        if kind not in ("", "function"):
            fields.refuse("tools", f"has a {kind} tool: there are functions only here")
            return None
    return [_nested(item) for item in value]


def read_choice(fields: Fields) -> Any:  # noqa: ANN401 - any JSON value
    """As a chat has it."""
    value = fields.raw("tool_choice")
    if value is None or value in ("none", "auto", "required"):
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "function" and isinstance(value.get("name"), str) and len(value) == 2:
        return _nested(value)
    if kind == "allowed_tools" and len(value) == 3 and value.get("mode") in ("auto", "required"):
        tools = value.get("tools")
        if isinstance(tools, list) and tools:
            allowed = {"mode": value["mode"], "tools": [_nested(tool) for tool in tools]}
            return {"type": kind, kind: allowed}
    fields.refuse("tool_choice", _CHOICES)
    return None


def type_of(item: Any) -> str:  # noqa: ANN401 - any JSON value
    """The type of an item or a tool; empty: it has none, or none that could be one's name."""
    kind = item.get("type") if isinstance(item, dict) else None
    return kind if isinstance(kind, str) and _TYPE.fullmatch(kind) else ""


def _nested(item: Any) -> Any:  # noqa: ANN401 - any JSON value
    """A function as a chat writes it; anything else as it is."""
    if not isinstance(item, dict) or item.get("type") != "function" or "function" in item:
        return item
    return {
        "type": "function",
        "function": {key: value for key, value in item.items() if key != "type"},
    }


def shown(fields: Fields) -> list[Json]:
    """The tools as an answer repeats them."""
    value = fields.raw("tools")
    items = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
    return [
        {
            "type": "function",
            **{key: item.get(key) for key in _KEYS},
            "strict": bool(item.get("strict")),
        }
        for item in items
    ]
