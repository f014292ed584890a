"""`tools`, `tool_choice` and `parallel_tool_calls`: OpenAI's fields to what a call offers, within
bounds. Knows no format of calls and no grammar.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from fader_server.api.fields import Fields, is_text
from fader_server.api.response_format import FIELD as SCHEMA
from fader_server.api.response_format import excesses
from fader_server.text.tools import Tool, ToolUse

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MOST = 128
MAX_TEXT = 1 << 18
"""Characters of all names, descriptions and parameters."""
MAX_PARTS = 1 << 14
"""Objects and lists of all parameters."""
_NOTHING = {"type": "object", "properties": {}}
_FORM = (
    "must be objects with type function and function, an object with name and maybe description, "
    "parameters and strict"
)
_CHOICES = (
    'must be none, auto, required, {"type": "function", "function": {"name": …}} or {"type": '
    '"allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": […]}}'
)
_KNOWN = ("type", "function", "strict")
_KNOWN_OF_FUNCTION = ("name", "description", "parameters", "strict")


@dataclass(frozen=True, slots=True)
class _Choice:
    """What `tool_choice` says."""

    mode: Literal["none", "auto", "required"]
    only: tuple[str, ...] | None = None
    """The functions that it names."""
    one: bool = False
    """One call."""


def read_tools(fields: Fields) -> ToolUse | None:
    """None: the model is shown none. Problems are noted in `fields`."""
    parallel = fields.boolean("parallel_tool_calls", default=True)
    tools = _tools(fields)
    choice = _choice(fields.raw("tool_choice"))
    if choice is None:
        fields.refuse("tool_choice", _CHOICES)
        return None
    if choice.mode == "none" or (not tools and choice == _Choice("auto")):
        return None
    if not {*(choice.only or ())} <= {tool.name for tool in tools}:
        fields.refuse("tool_choice", "names a function that is not among the tools")
        return None
    if not tools:
        fields.refuse("tool_choice", "needs tools")
        return None
    use = ToolUse(tools, choice.mode == "required", choice.only, parallel and not choice.one)
    if use.must or fields.raw(SCHEMA) is not None or any(tool.strict for tool in use.offered):
        kept = [dict(tool.parameters) for tool in use.offered]  # a grammar is made of them
        problem = next(excesses(kept, "parameters", parts=MAX_PARTS, text=MAX_TEXT), "")
        if problem:
            fields.refuse("tools", problem)
    return use


def _tools(fields: Fields) -> tuple[Tool, ...]:
    value = fields.raw("tools")
    if value is None or value == []:
        return ()
    items = fields.array("tools", most=_MOST)
    if items is None:
        return ()
    problem = next((found for found in map(_problem, items) if found), "")
    tools = () if problem else tuple(map(_tool, items))
    if not problem and len({tool.name for tool in tools}) != len(tools):
        problem = "has two functions of one name"
    if not problem:
        shown = [{"": tool.description, **tool.parameters} for tool in tools]
        bounds = {"parts": MAX_PARTS, "text": MAX_TEXT}
        problem = next(excesses(shown, "parameters", **bounds, kept=False), "")
    if problem:
        fields.refuse("tools", problem)
        return ()
    fields.unknown_inside("tools", items, _KNOWN)
    fields.unknown_inside("tools", (item["function"] for item in items), _KNOWN_OF_FUNCTION)
    return tools


def _problem(item: Any) -> str:  # noqa: ANN401 - any JSON value
    """What is wrong with what is read of one of `tools`."""
    if not isinstance(item, dict) or item.get("type") != "function":
        return _FORM
    function = item.get("function")
    if not isinstance(function, dict):
        return _FORM
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return "needs a function.name of up to 64 letters, digits, _ and -"
    if not (function.get("description") is None or is_text(function["description"])):
        return "has a function.description that is not text"
    if not {type(item.get("strict")), type(function.get("strict"))} <= {bool, type(None)}:
        return "has a function.strict that is not true or false"
    if (
        not isinstance(parameters, dict | None)
        or (parameters or {}).get("type", "object") != "object"
    ):
        return "has function.parameters that are not a JSON Schema of an object"
    return ""


def _tool(item: dict[str, Any]) -> Tool:
    function = item["function"]
    strict = function.get("strict")
    given = function.get("parameters") or _NOTHING
    # a grammar library's options among the keywords are not the client's to set
    parameters = {key: value for key, value in given.items() if key != "x-guidance"}
    return Tool(
        function["name"],
        function.get("description") or "",
        {"type": "object", **parameters},
        (item.get("strict") if strict is None else strict) is True,
    )


def _choice(value: Any) -> _Choice | None:  # noqa: ANN401 - any JSON value
    """None: it has none of the known forms."""
    if value in (None, "none", "auto", "required"):
        return _Choice(value or "auto")
    kind = value.get("type") if isinstance(value, dict) and len(value) == 2 else None
    if kind == "function":
        name = _name(value)
        return None if name is None else _Choice("required", (name,), one=True)
    allowed = value.get("allowed_tools") if kind == "allowed_tools" else None
    if not isinstance(allowed, dict) or {*allowed} != {"mode", "tools"}:
        return None
    mode, tools = allowed["mode"], allowed["tools"]
    if mode not in ("auto", "required") or not isinstance(tools, list):
        return None
    names = [_name(tool) for tool in tools[: _MOST + 1]]
    kept = tuple(name for name in names if name is not None)
    return _Choice(mode, kept) if 0 < len(kept) == len(names) <= _MOST else None


def _name(item: Any) -> str | None:  # noqa: ANN401 - any JSON value
    """The name in {"type": "function", "function": {"name": …}}."""
    if not isinstance(item, dict) or item.get("type") != "function" or len(item) != 2:
        return None
    function = item.get("function")
    if not isinstance(function, dict) or len(function) != 1:
        return None
    name = function.get("name")
    return name if isinstance(name, str) else None
