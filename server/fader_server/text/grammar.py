"""One grammar over a vocabulary, and the guides of outputs that follow it.

The library's parser does the work within bounds on every step; what it calls an error ends one
request. Knows no tensors and no HTTP.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from time import thread_time
from typing import Any

from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import gbnf_to_lark

from fader_server.errors import EngineFault
from fader_server.text.shape import Shape
from fader_server.text.vocabulary import Vocabulary

_LIMITS = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,  # of compiling, 20 ms
    "step_lexer_fuel": 100_000,  # of one token, 7 ms
    "step_max_items": 50_000,  # of one token, 3 ms
    "max_lexer_states": 50_000,  # half a kilobyte each
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}

_OPTIONS = {
    # At most a space or a line break with its indentation: a model that is forced may not stop to
    # write them else.
    "whitespace_pattern": r"( |\n[ \t]{0,64})?",
}

_LOOKS_AROUND = re.compile(r"\(\?<?[=!]|\\[bB1-9]")
_DATA = frozenset(("const", "default", "enum", "examples"))
"""Keywords whose values are no schemas."""

_CREDIT = 0.5
_PACE = 0.005
"""Seconds of the processor that a guide may take at all and on average for a token. Usual ones
take a hundredth of that, bounded texts over a large vocabulary a tenth."""

_TRIED = 8
"""Tokens of an output that are tried when a grammar is made."""
_WORN = 1024
"""Tokens after which a grammar is made anew for the next output: guides share what they find out
about it, and the bound on that."""


HEAD = '%llguidance {"no_forcing": true}\n'
"""Of every grammar: the model chooses between the ways to tokenise a text that is certain."""


def json_rule(schema: str, *, lenient: bool = False) -> str:
    """What stands in a grammar for JSON of a schema. lenient: as far as its keywords are known."""
    options = {**_OPTIONS, "lenient": lenient}
    read = json.loads(schema)
    kept = _without_lookaround(read) if lenient else read
    return "%json " + json.dumps(kept | {"x-guidance": options})


def _without_lookaround(part: Any) -> Any:  # noqa: ANN401 - any JSON value
    """A schema without the patterns that look around, which no grammar here can follow."""
    if isinstance(part, list):
        return [_without_lookaround(item) for item in part]
    if not isinstance(part, dict):
        return part
    kept = {}
    for key, value in part.items():
        if key == "pattern" and isinstance(value, str) and _LOOKS_AROUND.search(value):
            continue
        if key == "patternProperties" and isinstance(value, dict):
            value = {k: v for k, v in value.items() if not _LOOKS_AROUND.search(k)}
        kept[key] = value if key in _DATA else _without_lookaround(value)
    return kept


def in_lark(grammar: str) -> str:
    """A client's grammar as Lark has it. Raises ValueError for one that is no GBNF."""
    if "::=" not in grammar:
        return grammar
    try:
        return gbnf_to_lark(grammar)
    except Exception as error:  # of the library's, some of them no classes of their own
        raise ValueError("this is no GBNF") from error


def rule_of(shape: Shape) -> str:
    """What stands in a grammar for a text of that shape; a grammar is Lark."""
    if shape.kind == "grammar":
        return "%lark {\n" + shape.text + "\n}"
    if shape.kind == "choice":
        return " | ".join(json.dumps(text, ensure_ascii=False) for text in json.loads(shape.text))
    if shape.kind == "regex":
        (made,) = json.loads(LLMatcher.grammar_from_regex(shape.text))["grammars"]
        return made["lark_grammar"].removeprefix("start: ")
    return json_rule(shape.text, lenient=shape.lenient)


def grammar_of(shape: Shape) -> str:
    """A grammar in the library's words, for Grammar."""
    return f"{HEAD}start: {rule_of(shape)}\n"


class Grammar:
    """Compiled from a text; `problem` says why it cannot be used."""

    def __init__(self, source: str, vocabulary: Vocabulary) -> None:
        """source: in the library's words, beginning with HEAD.

        Takes some milliseconds, and half a second for the worst that the bounds let through."""
        self._vocabulary = vocabulary
        self._used = 0
        self._matcher = LLMatcher(
            vocabulary.tokens,
            source,
            log_level=0,
            limits=LLParserLimits(**_LIMITS),
        )
        self.problem = self._matcher.get_error() or self._try()

    @property
    def worn(self) -> bool:
        """Whether the next output should have another one."""
        return self._used > _WORN

    def guide(self) -> "GrammarGuide":
        """Of one output, at its start."""
        return GrammarGuide(self._matcher.deep_copy(), self)

    @property
    def size(self) -> int:
        return self._vocabulary.size

    def used(self) -> None:
        """A token was put out under it."""
        self._used += 1

    def _try(self) -> str:
        """What goes wrong in the first tokens of an output."""
        trial = self.guide()
        try:
            for _ in range(_TRIED):
                token = _lowest(trial.allowed())
                if token is None:
                    return "no token of this model can write what it asks for"
                trial.accept(token)
                if trial.ended:
                    break
        except EngineFault as fault:
            return str(fault)
        return ""


class GrammarGuide:
    """A core.Guide over the library's matcher."""

    def __init__(self, matcher: LLMatcher, grammar: Grammar) -> None:
        self._matcher = matcher
        self._grammar = grammar
        self._left = _CREDIT
        self.ended = False

    def allowed(self) -> bytes:
        with self._spending():
            bits = self._matcher.compute_bitmask()
        size = self._grammar.size
        if len(bits) * 8 <= size:
            return bits
        whole, rest = divmod(size, 8)
        return bits[:whole] + bytes([bits[whole] & ((1 << rest) - 1)]) if rest else bits[:whole]

    def accept(self, token: int) -> None:
        self._left += _PACE
        with self._spending():
            self._matcher.consume_token(token)
        self._grammar.used()
        self.ended = self._matcher.is_stopped()

    @contextmanager
    def _spending(self) -> Iterator[None]:
        began = thread_time()
        try:
            yield
        except BaseException as panic:  # of the library's, which is no Exception
            raise EngineFault("the guide of this request failed: its library panicked") from panic
        self._left -= thread_time() - began
        if self._matcher.is_error():
            raise EngineFault(f"the guide of this request failed: {self._matcher.get_error()}")
        if self._left < 0:
            raise EngineFault("the guide of this request is too slow: its schema is too complex")


def _lowest(bits: bytes) -> int | None:
    """The lowest id that is set."""
    at = next((at for at, byte in enumerate(bits) if byte), None)
    return None if at is None else 8 * at + (bits[at] & -bits[at]).bit_length() - 1
