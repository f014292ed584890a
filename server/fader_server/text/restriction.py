"""What a request forbids its output token by token: all but some ids, and words.

Knows token ids only; what an output must look like is another guide's.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fader_server.core import Guide

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Restriction:
    """Of all outputs of one request."""

    size: int
    """Of the vocabulary."""
    permitted: int
    """A bit for each id, lowest first: of those that may come at all."""
    banned: Sequence[Ids]
    """The tokens of words: the output has none in a row, unless nothing else could come."""

    def guide(self, inner: Guide | None) -> "RestrictedGuide":
        """Of one output, at its start."""
        return RestrictedGuide(self, inner)


class RestrictedGuide:
    """A core.Guide that takes from what another one allows, or from everything."""

    def __init__(self, restriction: Restriction, guide: Guide | None) -> None:
        self._guide = guide
        self._restriction = restriction
        self._tail: Ids = ()
        self._kept = max(map(len, restriction.banned), default=1) - 1

    @property
    def ended(self) -> bool:
        return self._guide is not None and self._guide.ended

    def allowed(self) -> bytes:
        restriction = self._restriction
        every = restriction.permitted
        if self._guide is not None:
            every &= int.from_bytes(self._guide.allowed(), "little")
        bits = every
        for word in restriction.banned:
            before = word[:-1]
            if not before or self._tail[-len(before) :] == before:
                bits &= ~(1 << word[-1])
        return (bits or every).to_bytes(-(-restriction.size // 8), "little")

    def accept(self, token: int) -> None:
        if self._kept:
            self._tail = (*self._tail, token)[-self._kept :]
        if self._guide is not None:
            self._guide.accept(token)


def restriction_of(
    ids: Sequence[int], words: Iterable[str], encode: Callable[[str], Ids], size: int
) -> Restriction:
    """Of the ids that may come, all if there are none, and of words as they are encoded inside and
    at the start of a text."""
    banned = {encode(text) for word in words for text in (word, f" {word.lstrip()}")}
    permitted = _bits(ids, size) if ids else (1 << size) - 1
    return Restriction(size, permitted, sorted(banned - {()}))


def _bits(tokens: Iterable[int], size: int) -> int:
    bits = bytearray(-(-size // 8))
    for token in tokens:
        if token < size:
            bits[token >> 3] |= 1 << (token & 7)
    return int.from_bytes(bits, "little")
