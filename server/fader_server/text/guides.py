"""Grammars by their text, made on a thread of their own, for tenants in turn, and kept; guides of
outputs under them.

Used on the event loop. Knows no words of JSON Schema and no tokens.
"""

import asyncio
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from typing import TypeVar

from fader_server.errors import Overloaded, RequestInvalid
from fader_server.portions import Portions
from fader_server.text.grammar import Grammar, GrammarGuide, grammar_of, in_lark
from fader_server.text.shape import Shape
from fader_server.text.vocabulary import Vocabulary
from fader_server.turns import Turns

T = TypeVar("T")

PATTERN = "a pattern"
_NOUNS = {"schema": "a schema", "regex": PATTERN, "choice": "choices", "grammar": "a grammar"}
_KEPT = 64
_WAITING = 32
"""Grammars that may wait for the thread; more are told to come again, of tenants that have their
part of them."""
_STACK = 256 << 20
"""Bytes of address space: the library follows references by recursion, some kilobytes each."""

_SIGNS = (
    ("nsatisfiable", "that nothing satisfies"),
    ("oneOf constraints", "with a oneOf that cannot be told apart: use anyOf"),
    ("regex", "with a pattern that is invalid or looks around"),
    ("Unknown format", "with a format that is not known here"),
    *((sign, "that is too complex for this server")
      for sign in ("too big", "too large", "oo many", "limit", "fuel", "max is", "slow", "level")),
)  # fmt: skip
"""How the library's message tells what is wrong: texts of the client are never repeated."""
_UNKNOWN = re.compile(r"Unimplemented keys: \[(.*)\]")
_WORDS = frozenset((
    "$dynamicRef", "contains", "dependencies", "dependentRequired", "dependentSchemas", "else",
    "if", "maxContains", "minContains", "not", "propertyNames", "then", "unevaluatedItems",
    "unevaluatedProperties", "uniqueItems",
))  # fmt: skip
"""Keywords that a refusal may name."""


class Guides:
    """Of one base. A schema is refused or its grammar kept, whichever comes of it."""

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        """vocabulary: reads it, once, on the thread, when the first schema comes."""
        self._read = vocabulary
        self._vocabulary: Vocabulary | None = None
        self._kept: OrderedDict[str, tuple[Grammar, str]] = OrderedDict()  # the tenant it came for
        self._lock = threading.Lock()  # guards what is kept between the thread and the loop
        self._waiting = Portions()
        self._turns = Turns()

    async def start_shape(
        self, shape: Shape, count: int, *, tenant: str = ""
    ) -> list[GrammarGuide]:
        """Guides for so many outputs of a shape. Raises RequestInvalid, Overloaded."""
        noun = _NOUNS[shape.kind]
        return await self.start(
            grammar_of(shape), count, param=shape.param, noun=noun, tenant=tenant
        )

    async def start(
        self, source: str, count: int, *, param: str, noun: str, tenant: str = ""
    ) -> list[GrammarGuide]:
        """The same under a grammar, for what the field `param` has in it.
        Raises RequestInvalid, Overloaded."""
        grammar = self._find(source)
        if grammar is None:
            grammar = await self._in_turn(tenant, partial(self._make, source, tenant))
        if grammar.problem:
            raise RequestInvalid(_told(grammar.problem, param, noun), param=param)
        return [grammar.guide() for _ in range(count)]

    async def in_lark(self, shape: Shape, *, tenant: str = "") -> Shape:
        """A shape whose grammar, if it is one, is Lark. Raises RequestInvalid, Overloaded."""
        if shape.kind != "grammar":
            return shape
        try:
            text = await self._in_turn(tenant, partial(in_lark, shape.text))
        except ValueError:
            raise RequestInvalid(f"{shape.param} is no valid GBNF", param=shape.param) from None
        return replace(shape, text=text)

    async def _in_turn(self, tenant: str, work: Callable[[], T]) -> T:
        """On the thread."""
        if self._waiting.full(tenant, _WAITING):
            raise Overloaded("many grammars are being made: try again later", retry_after=2)
        with self._waiting.one(tenant):
            async with self._turns.one(tenant):
                return await asyncio.wrap_future(self._executor.submit(work))

    def _find(self, source: str) -> Grammar | None:
        with self._lock:
            grammar, _ = self._kept.get(source, (None, ""))
            if grammar is None or grammar.worn:
                return None
            self._kept.move_to_end(source)
            return grammar

    def _make(self, source: str, tenant: str) -> Grammar:
        """On the thread."""
        found = self._find(source)
        if found is not None:  # somebody in front had the same
            return found
        if self._vocabulary is None:
            self._vocabulary = self._read()
        grammar = Grammar(source, self._vocabulary)
        with self._lock:
            self._kept[source] = grammar, tenant
            self._kept.move_to_end(source)
            if len(self._kept) > _KEPT:
                del self._kept[self._longest_unused()]
        return grammar

    def _longest_unused(self) -> str:
        """Of those that came for the tenant with the most of them."""
        counts = Counter(tenant for _, tenant in self._kept.values())
        most = max(counts.values())
        return next(key for key, (_, tenant) in self._kept.items() if counts[tenant] == most)

    @cached_property
    def _executor(self) -> ThreadPoolExecutor:
        executor = ThreadPoolExecutor(1, thread_name_prefix="fader-grammar")
        before = threading.stack_size(_STACK)
        try:
            executor.submit(int)  # begins the thread
        finally:
            threading.stack_size(before)
        return executor


def _told(problem: str, param: str, noun: str) -> str:
    """A sentence for the client of what the library says, whose later lines quote the schema."""
    first = problem.partition("\n")[0]
    unknown = _UNKNOWN.search(first)
    if unknown is not None:
        named = sorted(_WORDS.intersection(re.findall(r"[$\w]+", unknown[1])))
        found = f"with {', '.join(named) or 'keywords'}: not supported here"
    else:
        found = next((text for sign, text in _SIGNS if sign in first), "that is not valid here")
    return (
        f"{param} has {noun} {found.removeprefix('with a pattern ') if noun == PATTERN else found}"
    )
