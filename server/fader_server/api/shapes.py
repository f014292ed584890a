"""What an answer must look like: `response_format`, and the fields that vLLM, SGLang and llama.cpp
have for the same. Bounds hold before any grammar is made.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from fader_server.api import response_format
from fader_server.api.fields import Fields, is_text
from fader_server.api.response_format import MAX_STRING, MAX_TEXT, excesses, heavy, repeats
from fader_server.text.shape import Shape

MAX_CHOICES = 1024
MAX_GRAMMAR = 8192
"""Characters: the worst of so many take two seconds of the thread that makes grammars."""
_UNSET = (None, False, "", [])

Reader = Callable[[str, Any], Shape | str]
"""From a field and its value; a text completes "<field> …" and says what is wrong."""


def read_shape(fields: Fields) -> Shape | None:
    """What the answer must look like; None: like any text. Problems are noted in `fields`."""
    found = response_format.read_schema(fields)
    for name, reader in _READERS.items():
        value = fields.raw(name)
        if value in _UNSET or (name == _ALL and value == {}):
            continue
        shape = reader(name, value)
        if isinstance(shape, str):
            fields.refuse(name, shape)
        elif found is not None:
            fields.refuse(name, f"cannot stand beside {found.param}")
        else:
            found = shape
    return found


def _schema(name: str, value: object) -> Shape | str:
    """As an object or its JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return "must be a JSON Schema, as an object or as its text"
    if not isinstance(value, dict):
        return "must be a JSON Schema, as an object or as its text"
    problem = next(excesses([value], "a schema"), None)
    return problem or Shape("schema", response_format.kept(value), name)


def _regex(name: str, value: object) -> Shape | str:
    if not is_text(value) or not isinstance(value, str):
        return "must be a regular expression"
    problem = next(heavy(value), None)
    return f"is a regular expression {problem}" if problem else Shape("regex", value, name)


def _choice(name: str, value: object) -> Shape | str:
    if not isinstance(value, list) or not all(is_text(one) and one for one in value):
        return "must be a list of texts, none of them empty"
    if len(value) > MAX_CHOICES or sum(map(len, value)) > MAX_TEXT:
        return f"must have at most {MAX_CHOICES} texts of {MAX_TEXT} characters together"
    if max(map(len, value)) > MAX_STRING:
        return f"must have texts of at most {MAX_STRING} characters"
    return Shape("choice", json.dumps(value), name)


def _grammar(name: str, value: object) -> Shape | str:
    """Lark, or GBNF."""
    if not isinstance(value, str) or not is_text(value):
        return "must be a grammar, as Lark or GBNF write it"
    if len(value) > MAX_GRAMMAR:
        return f"must have at most {MAX_GRAMMAR} characters"
    if "%json" in value:
        return "has %json in it: a JSON Schema has fields of its own"
    problem = next(repeats(value), None)
    return f"is a grammar {problem}" if problem else Shape("grammar", value, name)


def _any_object(name: str, value: object) -> Shape | str:
    return Shape("schema", response_format.ANY_OBJECT, name) if value is True else "must be true"


_INNER: Mapping[str, Reader] = {
    "json": _schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "json_object": _any_object,
}


def _structured(name: str, value: object) -> Shape | str:
    """vLLM's object of one of these."""
    given = [key for key in value if value[key] is not None] if isinstance(value, dict) else []
    if not isinstance(value, dict) or len(given) != 1 or given[0] not in _INNER:
        return f"must be an object with one of {', '.join(_INNER)}"
    shape = _INNER[given[0]](name, value[given[0]])
    return f"has a {given[0]} that {shape}" if isinstance(shape, str) else shape


_ALL = "structured_outputs"
_READERS: Mapping[str, Reader] = {
    _ALL: _structured,
    "guided_json": _schema,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _grammar,
    "grammar": _grammar,
    "ebnf": _grammar,
    "json_schema": _schema,
    "regex": _regex,
}
SHAPE_FIELDS = frozenset((response_format.FIELD, *_READERS))
