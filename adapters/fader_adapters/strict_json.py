"""JSON from strangers: no duplicate names, no NaN, no endless nesting. Knows no schema."""

import json
from typing import Any, NoReturn

from fader_adapters.errors import AdapterInvalid


def load_object(data: bytes, what: str) -> dict[str, Any]:
    """Parse UTF-8 `data` as one JSON object; `what` names it in messages. Raises AdapterInvalid."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except RecursionError:
        raise AdapterInvalid(f"{what} is nested too deeply") from None
    except ValueError as error:  # also UnicodeDecodeError, JSONDecodeError and over-long integers
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else _short(error)
        raise AdapterInvalid(f"{what} is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise AdapterInvalid(f"{what} must be a JSON object, got {type(value).__name__}")
    if b"\\u" in data and not _is_text(value):
        raise AdapterInvalid(f"{what} has half a character, which JSON can write but UTF-8 cannot")
    return value


def _is_text(value: dict[str, Any]) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {twice[:80]!r} stands twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _short(error: Exception) -> str:
    return str(error)[:160]
