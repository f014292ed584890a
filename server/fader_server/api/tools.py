"""`tools`, `tool_choice` and `parallel_tool_calls`: OpenAI's fields to what a call offers, within
bounds. Knows no format of calls and no grammar.
"""

import re
from typing import Any

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
_KNOWN = ("name", "description", "parameters", "strict")


def read_tools(fields: Fields) -> ToolUse | None:
    """None: the model is shown none. Problems are noted in `fields`."""
    parallel = fields.boolean("parallel_tool_calls", default=True)
    tools = _tools(fields)
    choice = fields.raw("tool_choice")
    only = _named(choice)
    if only is None and choice not in (None, "none", "auto", "required"):
        fields.refuse(
            "tool_choice",
            'must be none, auto, required or {"type": "function", "function": {"name": …}}',
        )
        return None
    if choice == "none" or (not tools and choice in (None, "auto")):
        return None
    if only is not None and only not in [tool.name for tool in tools]:
        fields.refuse("tool_choice", "names a function that is not among the tools")
        return None
    if not tools:
        fields.refuse("tool_choice", "needs tools")
        return None
    use = ToolUse(tools, choice not in (None, "auto"), only, parallel)
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
    tools = () if problem else tuple(_tool(item["function"]) for item in items)
    if not problem and len({tool.name for tool in tools}) != len(tools):
        problem = "has two functions of one name"
    if not problem:
        shown = [{"": tool.description, **tool.parameters} for tool in tools]
        bounds = {"parts": MAX_PARTS, "text": MAX_TEXT}
        problem = next(excesses(shown, "parameters", **bounds, kept=False), "")
    if problem:
        fields.refuse("tools", problem)
        return ()
    return tools


def _problem(item: Any) -> str:  # noqa: ANN401 - any JSON value
    """What is wrong with one of `tools`."""
    if not isinstance(item, dict) or item.get("type") != "function":
        return _FORM
    function = item.get("function")
    if not isinstance(function, dict) or not {*item} <= {"type", "function"}:
        return _FORM
    if not {*function} <= {*_KNOWN}:
        return "has a function with more than name, description, parameters and strict"
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return "needs a function.name of up to 64 letters, digits, _ and -"
    if not (function.get("description") is None or is_text(function["description"])):
        return "has a function.description that is not text"
    if type(function.get("strict")) not in (bool, type(None)):
        return "has a function.strict that is not true or false"
    if (
        not isinstance(parameters, dict | None)
        or (parameters or {}).get("type", "object") != "object"
    ):
        return "has function.parameters that are not a JSON Schema of an object"
    return ""


def _tool(function: dict[str, Any]) -> Tool:
    given = function.get("parameters") or _NOTHING
    # a grammar library's options among the keywords are not the client's to set
    parameters = {key: value for key, value in given.items() if key != "x-guidance"}
    return Tool(
        function["name"],
        function.get("description") or "",
        {"type": "object", **parameters},
        function.get("strict") is True,
    )


def _named(choice: Any) -> str | None:  # noqa: ANN401 - any JSON value
    """The name in a `tool_choice` of that form."""
    if not isinstance(choice, dict) or choice.get("type") != "function" or len(choice) != 2:
        return None
    function = choice.get("function")
    if not isinstance(function, dict) or len(function) != 1:
        return None
    name = function.get("name")
    return name if isinstance(name, str) else None
