"""Arguments that a format writes as plain text: the JSON values they stand for, by their schema."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

_HOPS = 8
"""References and alternatives that are followed to learn a type."""
_SPELLINGS = {"True": "true", "False": "false", "None": "null"}
"""Models of these formats were taught by templates that write Python's words."""


def types_of(parameters: Mapping[str, Any], key: str) -> frozenset[str]:
    """The JSON types that a parameter may have; empty: any."""
    properties = parameters.get("properties")
    found = properties.get(key) if isinstance(properties, Mapping) else None
    return frozenset(_types(found, parameters, _HOPS))


def read_value(text: str, types: frozenset[str]) -> Any:  # noqa: ANN401 - any JSON value
    """The value that a text stands for: of a type that is no string where it can be read as one,
    else the text itself. Raises ValueError where the types have no string."""
    if types == {"string"}:
        return text
    try:
        value = json.loads(_SPELLINGS.get(text.strip(), text), parse_constant=_refuse)
    except ValueError:
        value = text
    if not isinstance(value, str) and (not types or _is_of(value, types)):
        return value
    if types and "string" not in types:
        raise ValueError("a value of another type")
    return text


def _types(schema: object, root: Mapping[str, Any], hops: int) -> Iterator[str]:
    if not isinstance(schema, Mapping) or hops == 0:
        return
    named = schema.get("type")
    if isinstance(named, str):
        yield named
    elif isinstance(named, list):
        yield from (name for name in named if isinstance(name, str))
    elif "enum" in schema or "const" in schema:
        values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema.get("const")]
        yield from map(_type, values)
    else:
        if isinstance(schema.get("$ref"), str):
            yield from _types(_target(schema["$ref"], root), root, hops - 1)
        for word in ("anyOf", "oneOf", "allOf"):
            below = schema.get(word)
            for part in below[:_HOPS] if isinstance(below, list) else ():
                yield from _types(part, root, hops // 2)


def _target(reference: str, root: Mapping[str, Any]) -> object:
    found: object = root
    for word in reference.removeprefix("#").split("/")[1:]:
        found = found.get(word) if isinstance(found, Mapping) else None
    return found


def _is_of(value: object, types: frozenset[str]) -> bool:
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


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
