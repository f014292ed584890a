"""The JSON values of arguments, also where a format writes them as text: by their schema."""

import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

_HOPS = 8
_MOST = 64
"""References and alternatives that are followed to learn types."""
_NOTES = frozenset(("title", "description", "default", "examples", "deprecated", "$comment"))
_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character, which JSON can write but UTF-8 cannot."""
_SPELLINGS = {"True": "true", "False": "false", "None": "null"}
"""Models of these formats were taught by templates that write Python's words."""


def keys_of(schema: Mapping[str, Any]) -> dict[str, bool]:
    """The keys of an object that has a schema, in its order, and if each must be there."""
    found, needed = schema.get("properties"), schema.get("required")
    keys = dict.fromkeys(found if isinstance(found, Mapping) else (), False)
    return keys | {
        key: True for key in (needed if isinstance(needed, list) else ()) if isinstance(key, str)
    }


def ways_of(parameters: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The schemas out of which a parameter's value has one, at least one; what is not followed here
    is left as it is."""
    properties = parameters.get("properties")
    found = properties.get(key) if isinstance(properties, Mapping) else None
    return alternatives(found, parameters) if isinstance(found, Mapping) else [{}]


def alternatives(schema: Mapping[str, Any], root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The same of any schema in the parameters `root`."""
    ways = list(itertools.islice(_ways(schema, root, _HOPS), _MOST + 1))
    return ways if len(ways) <= _MOST else [schema]


def types_of(ways: list[Mapping[str, Any]]) -> frozenset[str]:
    """The JSON types of a value that has one of these schemas; empty: any."""
    found = [types_in(way) for way in ways]
    return frozenset().union(*found) if all(found) else frozenset()


def types_in(way: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types that a schema names; empty: any."""
    named = way.get("type")
    if isinstance(named, str):
        return frozenset((named,))
    if isinstance(named, list):
        return frozenset(name for name in named if isinstance(name, str))
    return frozenset(map(_type, values_of(way) or ()))


def values_of(way: Mapping[str, Any]) -> list[Any] | None:
    """The only values that a schema lets through, if it lists them."""
    if "const" in way:
        return [way["const"]]
    return way["enum"] if isinstance(way.get("enum"), list) else None


def written_object(value: object) -> str:
    """Arguments as clients get them. Raises ValueError for what is no JSON object."""
    if not isinstance(value, dict):
        raise ValueError("no object")
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return json.dumps(value) if not text.isascii() and _SURROGATE.search(text) else text


def load_json(text: str) -> Any:  # noqa: ANN401 - any JSON value
    """Raises ValueError, RecursionError."""
    return json.loads(text, strict=False, parse_constant=_refuse, parse_float=_finite)


def read_value(text: str, types: frozenset[str]) -> Any:  # noqa: ANN401 - any JSON value
    """The value that a text stands for: of a type that is no string where it can be read as one,
    else the text itself. Raises ValueError where the types have no string."""
    if types == {"string"}:
        return text
    try:
        value = load_json(_SPELLINGS.get(text.strip(), text))
    except (ValueError, RecursionError):
        value = text
    if not isinstance(value, str) and (not types or is_of(value, types)):
        return value
    if types and "string" not in types:
        raise ValueError("a value of another type")
    return text


def _ways(
    schema: Mapping[str, Any], root: Mapping[str, Any], hops: int
) -> Iterator[Mapping[str, Any]]:
    below = _below(schema, root) if hops else None
    if below is None:
        yield schema
        return
    for part in below:
        yield from _ways(part, root, hops - 1)


def _below(schema: Mapping[str, Any], root: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The schemas that this one is an alternative of, and nothing more."""
    word = next((word for word in ("$ref", "anyOf", "oneOf", "allOf") if word in schema), None)
    if word is None or not _NOTES.issuperset(schema.keys() - {word}):
        return None
    found = [_target(schema[word], root)] if word == "$ref" else schema[word]
    if not isinstance(found, list) or (word == "allOf" and len(found) != 1):
        return None
    parts = [part for part in found if isinstance(part, Mapping)]
    return parts if parts and len(parts) == len(found) else None


def _target(reference: object, root: Mapping[str, Any]) -> object:
    found: object = root
    for word in str(reference).removeprefix("#").split("/")[1:]:
        found = found.get(word) if isinstance(found, Mapping) else None
    return found


def is_of(value: object, types: frozenset[str]) -> bool:
    """Whether a value has one of these JSON types."""
    name = _type(value)
    return name in types or (name == "integer" and "number" in types)


def _type(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    kinds = {int: "integer", str: "string", list: "array"}
    return kinds.get(type(value), "object")


def _finite(text: str) -> float:
    """Numbers beyond floats are the outermost of those."""
    return max(-sys.float_info.max, min(float(text), sys.float_info.max))


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
