"""Regular expressions as functions on sets of positions: matching without backtracking.

A node maps the positions where a match may start to those where it may end. Knows no syntax.
"""

import string
from collections.abc import Callable
from dataclasses import dataclass

MAX_TEXT = 1024
"""Characters of a text."""
WORK = 1_000_000
"""Node visits one Budget allows."""

Positions = int
"""A set of positions in the text, as a bit mask: bit i stands before character i."""

CLASSES = {
    "d": string.digits,
    "w": string.ascii_letters + string.digits + "_",
    "s": " \t\n\r\f\v",
}


class PatternUnsafe(ValueError):
    """The pattern is malformed, uses syntax outside the subset, or costs more than the budget."""


class Budget:
    """Work left for a group of matches; the same patterns and texts always cost the same."""

    def __init__(self, work: int = WORK) -> None:
        self._left = work
        self._indexes: dict[str, dict[str, Positions]] = {}

    def index(self, text: str) -> dict[str, Positions]:
        """Where every character of the text stands; computed once a text. Raises PatternUnsafe."""
        index = self._indexes.get(text)
        if index is None:
            if len(text) > MAX_TEXT or not text.isascii():
                raise PatternUnsafe("the text is too long or not ASCII")
            index = self._indexes[text] = {}
            for place, char in enumerate(text):
                self.spend()
                index[char] = index.get(char, 0) | 1 << place
        return index

    def spend(self, work: int = 1) -> None:
        self._left -= work
        if self._left < 0:
            raise PatternUnsafe("it costs too much to evaluate")


@dataclass(frozen=True, slots=True)
class Text:
    """An ASCII text with the positions of every character, so that a class is one mask."""

    text: str
    at: dict[str, Positions]
    budget: Budget

    @classmethod
    def of(cls, text: str, budget: Budget) -> "Text":
        return cls(text, budget.index(text), budget)

    @property
    def everywhere(self) -> Positions:
        return (1 << len(self.text) + 1) - 1

    def where(self, chars: frozenset[str], *, negated: bool) -> Positions:
        mask = 0
        for char, positions in self.at.items():
            if (char in chars) is not negated:
                mask |= positions
        return mask


Node = Callable[[Text, Positions], Positions]
"""From the set of positions where a match may start to the set where it may end."""


def chars_node(chars: frozenset[str], *, negated: bool) -> Node:
    def match(subject: Text, starts: Positions) -> Positions:
        subject.budget.spend()
        return (starts & subject.where(chars, negated=negated)) << 1

    return match


def sequence_node(nodes: list[Node]) -> Node:
    def match(subject: Text, starts: Positions) -> Positions:
        for node in nodes:
            if not starts:
                break
            starts = node(subject, starts)
        return starts

    return match


def either_node(nodes: list[Node]) -> Node:
    def match(subject: Text, starts: Positions) -> Positions:
        subject.budget.spend()
        ends = 0
        for node in nodes:
            ends |= node(subject, starts)
        return ends

    return match


def repeat_node(node: Node, least: int, most: int | None) -> Node:
    def match(subject: Text, starts: Positions) -> Positions:
        reached = starts
        for _ in range(least):
            subject.budget.spend()
            if not reached:
                return 0
            following = node(subject, reached)
            if following == reached:  # a fixed point: further rounds change nothing
                break
            reached = following
        ends, frontier, rounds = reached, reached, least
        while frontier and (most is None or rounds < most):
            subject.budget.spend()
            frontier = node(subject, frontier) & ~ends
            ends |= frontier
            rounds += 1
        return ends

    return match


def assertion_node(kind: str) -> Node:
    def match(subject: Text, starts: Positions) -> Positions:
        subject.budget.spend()
        last = len(subject.text)
        if kind in {"^", "A"}:
            return starts & 1
        if kind in {"$", "Z"}:
            newline = kind == "$" and subject.text.endswith("\n")
            return starts & ((1 << last) | (1 << last - 1 if newline else 0))
        word = subject.where(frozenset(CLASSES["w"]), negated=False)
        boundary = word ^ (word << 1)
        return starts & (boundary if kind == "b" else subject.everywhere & ~boundary)

    return match


def look_ahead_node(node: Node, *, negated: bool) -> Node:
    def match(subject: Text, starts: Positions) -> Positions:
        passed = 0
        for index in range(len(subject.text) + 1):
            if starts >> index & 1:
                subject.budget.spend()
                if bool(node(subject, 1 << index)) is not negated:
                    passed |= 1 << index
        return passed

    return match
