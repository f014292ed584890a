"""`response_format`: OpenAI's field to a JSON Schema as text, within bounds that hold before any
grammar is made of it. Knows JSON Schema's words as far as they cost; nothing about grammars.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from fader_server.api.fields import Fields, is_text
from fader_server.text.shape import Shape

FIELD = "response_format"
ANY_OBJECT = '{"type": "object"}'

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_KNOWN = ("type", "json_schema")
_KNOWN_OF_OBJECT = (*_KNOWN, "schema")
_KNOWN_OF_SCHEMA = ("name", "description", "schema", "strict")

MAX_PARTS = 4096
"""Objects and lists in a schema: what may be nested through references is at most that deep."""
MAX_TEXT = 1 << 16
"""Characters of all its names and texts."""
MAX_STRING = 2048
"""Of one of them that answers are compared with, character by character."""
MAX_PATTERN = 512
MAX_COUNT = 8192
"""Of characters, items or properties: each that is counted may be a state."""
_NOTES = frozenset(("title", "description", "$comment"))
_COUNTS = frozenset(
    ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
)
_REPEATS = re.compile(r"\{(\d*),?(\d*)\}")


def read_schema(fields: Fields) -> Shape | None:
    """The schema that the answer must have; None for any text. Problems are noted in `fields`.

    Without strict its keywords count as far as they can be enforced, as OpenAI has it.
    """
    value = fields.raw(FIELD)
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    known = _KNOWN_OF_OBJECT if kind == "json_object" else _KNOWN
    if kind not in ("text", "json_object", "json_schema") or not _only(value, known):
        fields.refuse(FIELD, "must be an object with type text, json_object or json_schema")
        return None
    if kind == "text":
        return None
    if kind == "json_object" and value.get("schema") in (None, {}):
        return Shape("schema", ANY_OBJECT)
    bare = kind == "json_object"  # llama.cpp's form of json_schema
    inner = None if bare else value.get("json_schema")
    problem = _problem_of_schema(value["schema"], "schema") if bare else _problem(inner)
    if problem:
        fields.refuse(FIELD, problem)
        return None
    if bare:
        return Shape("schema", kept(value["schema"]))
    inner = value["json_schema"]
    return Shape("schema", kept(inner["schema"]), lenient=inner.get("strict") is not True)


def kept(schema: dict[str, Any]) -> str:
    """As text, without a grammar library's options among its keywords: those are not the client's
    to set."""
    return json.dumps({key: part for key, part in schema.items() if key != "x-guidance"})


def _only(value: dict[str, Any], known: tuple[str, ...]) -> bool:
    return all(key in known for key in value)


def _problem(value: object) -> str:
    """What is wrong with a `json_schema`; empty: nothing that can be told here."""
    if not isinstance(value, dict) or not _only(value, _KNOWN_OF_SCHEMA):
        return "needs json_schema, an object with name, schema and maybe strict and description"
    name = value.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return "needs json_schema.name, up to 64 letters, digits, _ and -"
    if type(value.get("strict", False)) not in (bool, type(None)):
        return "has a json_schema.strict that is not true or false"
    if not isinstance(value.get("description", ""), str | None):
        return "has a json_schema.description that is not text"
    return _problem_of_schema(value.get("schema"), "json_schema.schema")


def _problem_of_schema(schema: object, name: str) -> str:
    if not isinstance(schema, dict):
        return f"needs {name}, a JSON Schema as an object"
    return next(excesses([schema], "a schema"), "")


def excesses(
    schemas: Sequence[dict[str, Any]],
    noun: str,
    *,
    parts: int = MAX_PARTS,
    text: int = MAX_TEXT,
    kept: bool = True,
) -> Iterator[str]:
    """What in some schemas together is too much, the first of it as soon as it is met.

    kept: a grammar is made of them; else they are only shown.
    """
    met, length = 0, 0
    below: list[Any] = list(schemas)
    while below:
        part = below.pop()
        met += 1
        if met > parts:
            yield f"has {noun} of more than {parts} objects and lists"
        pairs = part.items() if isinstance(part, dict) else (("", item) for item in part)
        for key, value in pairs:
            length += len(key) + (len(value) if isinstance(value, str) else 1)
            if length > text:
                yield f"has {noun} of more than {text} characters"
            yield from (f"has {noun} {what}" for what in _malformed(key, value))
            if kept:
                yield from (f"has {noun} {what}" for what in _excess(key, value))
            if isinstance(value, dict | list):
                below.append(value)


def _malformed(key: str, value: object) -> Iterator[str]:
    if isinstance(value, str) and not is_text(value):
        yield "with text that is no valid Unicode"
    if isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) < 1e300:
        yield "with a number beyond 1e300"
    if not is_text(key) or len(key) > MAX_STRING:
        yield f"with a name that is no Unicode or longer than {MAX_STRING}"


def _excess(key: str, value: object) -> Iterator[str]:
    if isinstance(value, str):
        if key == "$ref" and not value.startswith("#"):
            yield "with a $ref that leaves it: only #/… is followed"
        if key == "pattern":
            yield from (f"with a pattern {what}" for what in heavy(value))
        if key not in _NOTES and len(value) > MAX_STRING:
            yield f"with text of more than {MAX_STRING} characters"
    elif key == "patternProperties" and isinstance(value, dict):
        for pattern in value:
            yield from (f"with a pattern {what}" for what in heavy(pattern))
    elif isinstance(value, int | float) and key in _COUNTS and value > MAX_COUNT:
        yield f"with a {key} above {MAX_COUNT}"


def heavy(pattern: str) -> Iterator[str]:
    """What about a pattern is too much."""
    if len(pattern) > MAX_PATTERN:
        yield f"of more than {MAX_PATTERN} characters"
    yield from repeats(pattern)


def repeats(pattern: str) -> Iterator[str]:
    """What about its counts is too much."""
    counts = (count for pair in _REPEATS.findall(pattern) for count in pair if count)
    if any(len(count) > 4 or int(count) > MAX_COUNT for count in counts):
        yield f"that repeats more than {MAX_COUNT} times"
