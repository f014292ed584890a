"""What an answer must look like, as a request asks for it. Knows no grammar and no HTTP."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the whole answer, or of the content beside calls of tools."""

    kind: Literal["schema", "regex", "choice", "grammar"]
    text: str
    """A JSON Schema, a regular expression that the whole answer matches, a JSON list of texts, one
    of which it is, or a grammar as Lark or llama.cpp (GBNF) write it."""
    param: str = "response_format"
    """The field that asked."""
    lenient: bool = False
    """Of a schema's keywords those count that can be enforced."""
