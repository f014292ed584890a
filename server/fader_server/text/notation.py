"""Arguments as members, key and value, in a notation that is no JSON: facts, and how values are
written. Knows no calls around them and no grammar."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Notation:
    """Members stand between brackets, after each other."""

    brackets: str
    """The first and the last."""
    within: str
    """Between a key and its value."""
    apart: str
    """Between two members."""
    quote: str
    """The special token around texts, in the alphabet of `tool_format`, which then have no escapes;
    empty: texts are quoted as in Python."""
    words: tuple[str, str, str] = ("true", "false", "null")

    def word(self, value: bool | None) -> str:
        true, false, null = self.words
        return null if value is None else true if value else false

    def written(self, value: Any) -> str:  # noqa: ANN401 - any JSON value
        """A value."""
        if isinstance(value, str):
            return f"{self.quote}{value}{self.quote}" if self.quote else _quoted(value)
        if value is None or isinstance(value, bool):
            return self.word(value)
        if isinstance(value, Mapping):
            return "{" + self.apart.join(self._members(value)) + "}"
        if isinstance(value, list):
            return f"[{self.apart.join(map(self.written, value))}]"
        return json.dumps(value)

    def arguments(self, given: Mapping[str, Any]) -> str:
        """All members of a call, in their brackets."""
        first, last = self.brackets
        members = (f"{key}{self.within}{self.written(value)}" for key, value in given.items())
        return first + self.apart.join(members) + last

    def _members(self, given: Mapping[str, Any]) -> list[str]:
        """Of an object within: in Python its keys are texts."""
        if self.quote:
            return [f"{key}{self.within}{self.written(value)}" for key, value in given.items()]
        return [f"{_quoted(key)}: {self.written(value)}" for key, value in given.items()]


def _quoted(text: str) -> str:
    """JSON's escapes are Python's."""
    return json.dumps(text, ensure_ascii=False)
