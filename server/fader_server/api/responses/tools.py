"""`tools` and `tool_choice` of a response, which name their functions one level further up than a
chat does. Judges forms that a chat cannot have, no more."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fader_server.api.fields import Fields
from fader_server.api.pieces import Json
from fader_server.api.tools import NAME

_TYPE = re.compile(r"[a-z0-9_]{1,40}", re.ASCII)
_SEARCH = "web_search"
_CHOICES = (
    'must be none, auto, required, {"type": "function", "name": …} or {"type": "allowed_tools", '
    '"mode": "auto" or "required", "tools": […]}'
)
_SPACE = (
    "has a namespace that does not have a name of up to 64 letters, digits, _ and -, and tools, a "
    "list of functions"
)
_KEYS = ("name", "description", "parameters")


@dataclass(frozen=True, slots=True)
class Offer:
    """What a response may call."""

    tools: Any
    """As a chat has them; what are no tools is as it came."""
    namespaces: Mapping[str, str]
    """By function, where it stands in one."""

    @property
    def shown(self) -> list[Json]:
        """The functions as an answer repeats them, once they are known to be some."""
        functions = [tool["function"] for tool in self.tools or ()]
        return [
            {
                "type": "function",
                **{key: function.get(key) for key in _KEYS},
                "strict": function.get("strict") is True,
            }
            for function in functions
        ]


def read_offer(fields: Fields) -> Offer:
    """Functions, those of namespaces too. A web search beside them is passed over: Codex always
    sends one, and a model is free not to search."""
    value = fields.raw("tools")
    if not isinstance(value, list):
        return Offer(value, {})
    tools: list[Any] = []
    namespaces: dict[str, str] = {}
    for item in value:
        if type_of(item) != "namespace":
            tools.append(_nested(item))
            continue
        functions = _of_namespace(item)
        if functions is None:
            fields.refuse("tools", _SPACE)
            return Offer(None, {})
        tools += map(_nested, functions)
        named = (one.get("name") for one in functions if isinstance(one, dict))
        namespaces |= {name: item["name"] for name in named if isinstance(name, str)}
    kept = [tool for tool in tools if type_of(tool) != _SEARCH]
    if kept:
        fields.ignored += len(tools) - len(kept)
        tools = kept
    hosted = next((kind for kind in map(type_of, tools) if kind not in ("", "function")), None)
    if hosted is not None:
        fields.refuse("tools", f"has a {hosted} tool: there are functions only here")
        return Offer(None, {})
    return Offer(tools, namespaces)


def read_choice(fields: Fields) -> Any:  # noqa: ANN401 - any JSON value
    """As a chat has it."""
    value = fields.raw("tool_choice")
    if value is None or value in ("none", "auto", "required"):
        return value
    kind = type_of(value)
    if _is_name(value):
        return _nested(value)
    if kind == "allowed_tools" and len(value) == 3 and value.get("mode") in ("auto", "required"):
        tools = value.get("tools")
        if isinstance(tools, list) and tools and all(map(_is_name, tools)):
            allowed = {"mode": value["mode"], "tools": [_nested(tool) for tool in tools]}
            return {"type": kind, kind: allowed}
    fields.refuse("tool_choice", _CHOICES)
    return None


def type_of(item: Any) -> str:  # noqa: ANN401 - any JSON value
    """The type of an item or a tool; empty: it has none, or none that could be one's name."""
    kind = item.get("type") if isinstance(item, dict) else None
    return kind if isinstance(kind, str) and _TYPE.fullmatch(kind) else ""


def _is_name(value: Any) -> bool:  # noqa: ANN401 - any JSON value
    """{"type": "function", "name": …}, and no more."""
    return type_of(value) == "function" and len(value) == 2 and isinstance(value.get("name"), str)


def _of_namespace(item: Json) -> list[Any] | None:
    """Its tools; None: it is none."""
    name, tools = item.get("name"), item.get("tools")
    if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(tools, list):
        return None
    return tools


def _nested(item: Any) -> Any:  # noqa: ANN401 - any JSON value
    """A function as a chat writes it; anything else as it is."""
    if type_of(item) != "function" or "function" in item:
        return item
    return {
        "type": "function",
        "function": {key: value for key, value in item.items() if key != "type"},
    }
