"""Regular expressions from strangers, compiled for matching in bounded work. Knows no adapters.

Understands the regular part of Python's syntax: literals, classes, groups, |, greedy and lazy
repeats, ^ $ \\A \\Z \\b \\B, lookahead. No lookbehind, backreferences, possessive repeats or flags.
"""

import re

from fader_adapters.pattern_nodes import (
    CLASSES,
    Budget,
    Node,
    PatternUnsafe,
    Text,
    assertion_node,
    chars_node,
    either_node,
    look_ahead_node,
    repeat_node,
    sequence_node,
)

MAX_LENGTH = 4096
"""Characters of a pattern."""
MAX_DEPTH = 32
"""Nested groups."""

_READING = 4
"""Work that reading a character is, in node visits."""
_TO_A_DOT = r"(?:.*\.)?"
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
_COUNTS = re.compile(r"\{(?!\})(\d*)(?:(,)(\d*))?\}", re.ASCII)
_MAX_DIGITS = 4
_ASSERTIONS = {"b", "B", "A", "Z"}


class Pattern:
    """A compiled pattern."""

    def __init__(self, pattern: str, budget: Budget, *, ending: bool = False) -> None:
        """ending: it may also follow a dot, whatever is before that.

        Raises PatternUnsafe for malformed patterns, syntax outside the subset, and when the budget
        ends.
        """
        node = _Parser(pattern, budget).parse()
        self._node = sequence_node([_Parser(_TO_A_DOT, budget).parse(), node]) if ending else node

    def fullmatch(self, text: str, budget: Budget) -> bool:
        """What `re.fullmatch` says of ASCII `text`. Raises PatternUnsafe when the budget ends."""
        return bool(self._node(Text.of(text, budget), 1) >> len(text) & 1)


class _Parser:
    """Recursive descent; every method leaves `_at` behind what it consumed."""

    def __init__(self, pattern: str, budget: Budget) -> None:
        if len(pattern) > MAX_LENGTH or not pattern.isascii():
            raise PatternUnsafe(f"it is not ASCII or longer than {MAX_LENGTH} characters")
        budget.spend(_READING * len(pattern))
        self._pattern = pattern
        self._at = 0

    def parse(self) -> Node:
        node = self._alternatives(0)
        if self._at < len(self._pattern):
            raise PatternUnsafe(f"unbalanced ')' at {self._at}")
        return node

    def _alternatives(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise PatternUnsafe(f"more than {MAX_DEPTH} nested groups")
        branches = [self._branch(depth)]
        while self._take("|"):
            branches.append(self._branch(depth))
        return branches[0] if len(branches) == 1 else either_node(branches)

    def _branch(self, depth: int) -> Node:
        nodes: list[Node] = []
        while self._at < len(self._pattern) and self._peek() not in "|)":
            nodes.append(self._quantified(self._atom(depth)))
        return sequence_node(nodes)

    def _quantified(self, node: Node) -> Node:
        bounds = self._quantifier()
        if bounds is None:
            return node
        self._take("?")  # lazy or greedy: the language is the same
        if self._peek() in "*+?" or self._quantifier() is not None:
            raise PatternUnsafe(f"a repeat of a repeat at {self._at}")
        return repeat_node(node, *bounds)

    def _quantifier(self) -> tuple[int, int | None] | None:
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if self._peek() in simple:
            return simple[self._next()]
        counts = _COUNTS.match(self._pattern, self._at)
        if counts is None:
            return None
        low, comma, high = counts.groups()
        if max(len(low), len(high or "")) > _MAX_DIGITS:
            raise PatternUnsafe(f"a repeat count of more than {_MAX_DIGITS} digits")
        self._at = counts.end()
        least = int(low or 0)
        most = least if not comma else int(high) if high else None
        if most is not None and most < least:
            raise PatternUnsafe("a repeat whose bounds are reversed")
        return least, most

    def _atom(self, depth: int) -> Node:
        char = self._next()
        if char == "(":
            return self._group(depth)
        if char == "[":
            return self._class()
        if char == ".":
            return chars_node(frozenset("\n"), negated=True)
        if char in "^$":
            return assertion_node(char)
        if char in "*+?":
            raise PatternUnsafe(f"nothing to repeat at {self._at - 1}")
        if char != "\\":
            return chars_node(frozenset(char), negated=False)
        if self._peek() in _ASSERTIONS:
            return assertion_node(self._next())
        chars, negated = self._escape()
        return chars_node(chars, negated=negated)

    def _group(self, depth: int) -> Node:
        look: bool | None = None
        if self._take("?"):
            kind = self._next()
            if kind == "P" and self._take("<"):
                end = self._pattern.find(">", self._at)
                if end < 0 or not self._pattern[self._at : end].isidentifier():
                    raise PatternUnsafe("a group name that is not an identifier")
                self._at = end + 1
            elif kind in "=!":
                look = kind == "!"
            elif kind != ":":
                raise PatternUnsafe(f"the group (?{kind} is not supported")
        node = self._alternatives(depth + 1)
        if not self._take(")"):
            raise PatternUnsafe("a group is not closed")
        return node if look is None else look_ahead_node(node, negated=look)

    def _class(self) -> Node:
        negated = self._take("^")
        chars: set[str] = set()
        first = True
        while first or self._peek() != "]":
            first = False
            single = self._class_member(chars)
            following = self._pattern[self._at + 1 : self._at + 2]
            if single is not None and self._peek() == "-" and following != "]":
                self._at += 1
                last = self._class_member(set())
                if last is None or last < single:
                    raise PatternUnsafe("a character range that is reversed or not of characters")
                chars |= {chr(code) for code in range(ord(single), ord(last) + 1)}
        self._at += 1
        return chars_node(frozenset(chars), negated=negated)

    def _class_member(self, chars: set[str]) -> str | None:
        """Add one member; returns it when it is a single character, None for \\d and the like."""
        char = self._next()
        if char != "\\":
            if char == "[":
                raise PatternUnsafe("'[' inside a character class; escape it")
            chars.add(char)
            return char
        members, negated = self._escape()
        if negated:
            members = frozenset(map(chr, range(128))) - members
        chars |= members
        return next(iter(members)) if len(members) == 1 else None

    def _escape(self) -> tuple[frozenset[str], bool]:
        char = self._next()
        if char.lower() in CLASSES:
            return frozenset(CLASSES[char.lower()]), char.isupper()
        if char in _ESCAPES:
            return frozenset(_ESCAPES[char]), False
        if char.isalnum():
            raise PatternUnsafe(f"the escape \\{char} is not supported")
        return frozenset(char), False

    def _peek(self) -> str:
        """The next character; at the end a NUL, which no pattern needs."""
        return self._pattern[self._at] if self._at < len(self._pattern) else "\0"

    def _next(self) -> str:
        if self._at >= len(self._pattern):
            raise PatternUnsafe("it ends too early")
        self._at += 1
        return self._pattern[self._at - 1]

    def _take(self, char: str) -> bool:
        taken = self._peek() == char
        self._at += taken
        return taken
