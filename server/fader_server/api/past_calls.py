"""Calls of tools that an assistant made before, as clients keep them. A chat goes on after a call
that went wrong: arguments that cannot be read are none. Knows no templates.
"""

import json
from dataclasses import dataclass
from typing import Any, cast

from fader_server.api.body import parse
from fader_server.api.fields import is_text
from fader_server.api.tools import NAME
from fader_server.errors import RequestInvalid

MAX_ID = 256
UNSET = (None, "")
CALLS = (
    "must have tool_calls that are objects with type function and function, an object with a name, "
    f"and maybe with id, text of up to {MAX_ID} characters"
)


@dataclass(frozen=True, slots=True)
class PastCall:
    """A call of a tool that an assistant made before."""

    id: str
    name: str
    arguments: dict[str, Any]


def read_call(item: Any, id: str) -> PastCall | None:  # noqa: ANN401 - any JSON value
    """One of `tool_calls`; None: it is none. id: what it has if it says no other."""
    function = item.get("function") if isinstance(item, dict) else None
    if not isinstance(function, dict) or item.get("type", "function") != "function":
        return None
    name, given = function.get("name"), item.get("id")
    given = id if given in UNSET else given
    if not is_id(given) or not isinstance(name, str) or not NAME.fullmatch(name):
        return None
    return PastCall(given, name, _arguments(function.get("arguments")))


def is_id(value: object) -> bool:
    return is_text(value) and 0 < len(cast(str, value)) <= MAX_ID


def _arguments(value: object) -> dict[str, Any]:
    """An object, or what is the text of one; all else is none."""
    escaped = True
    if isinstance(value, str):
        escaped = "\\u" in value  # else no half character can be in it
        try:
            value = parse(value.encode())
        except (RequestInvalid, UnicodeEncodeError):
            return {}
    if not isinstance(value, dict):
        return {}
    return value if not escaped or is_text(json.dumps(value, ensure_ascii=False)) else {}
