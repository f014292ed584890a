"""What a text will say next, if it goes on as it, or what was foretold of it, went on before.

Knows one sequence's tokens; no rows, no rates.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence

_NGRAM = 3
"""Tokens in a row that must have been there before."""
_REACH = 1 << 15
"""Tokens in which they are sought: a text's last when it is first read, a prediction's first."""

Gram = tuple[int, ...]


class Recall:
    """Of one sequence, which only grows."""

    def __init__(self, prediction: Sequence[int], prompt_len: int) -> None:
        """prediction: what its caller says its output will be like."""
        self._foretold = _Foretold(prediction, prompt_len) if prediction else None
        self._after: dict[Gram, int] = {}
        """Where the last of these tokens were followed by another: its place."""
        self._read = 0

    def next(self, tokens: list[int], most: int) -> list[int]:
        """At most so many tokens that may come after these; by what was foretold, where the output
        is at a place of it, else by what was said."""
        told = self._foretold.next(tokens, most) if self._foretold is not None else []
        return told or self._said(tokens, most)

    def _said(self, tokens: list[int], most: int) -> list[int]:
        first = max(self._read or len(tokens) - _REACH, _NGRAM)
        self._after.update(zip(_grams(tokens, first), range(first, len(tokens)), strict=False))
        self._read = len(tokens)
        at = self._after.get(tuple(tokens[-_NGRAM:]))
        if at is None:
            return []
        found = tokens[at : at + most]
        while len(found) < most:  # it went round: and so on
            found.append(found[-(len(tokens) - at)])
        return found


class _Foretold:
    """A text that the output may follow, from its beginning or from wherever it comes to it."""

    def __init__(self, text: Sequence[int], prompt_len: int) -> None:
        self._text = list(text[:_REACH])
        self._read = prompt_len
        self._at = 0
        """The place in the text of what would come next."""
        self._lost = False
        self._places: defaultdict[Gram, list[int]] = defaultdict(list)
        for place, gram in enumerate(_grams(self._text, _NGRAM), _NGRAM):
            self._places[gram].append(place)

    def next(self, tokens: list[int], most: int) -> list[int]:
        for end in range(self._read + 1, len(tokens) + 1):
            self._follow(tokens, end)
        self._read = len(tokens)
        return [] if self._lost else self._text[self._at : self._at + most]

    def _follow(self, tokens: list[int], end: int) -> None:
        """Take one more token in, the one before `end`."""
        if not self._lost and self._text[self._at : self._at + 1] == [tokens[end - 1]]:
            self._at += 1
            return
        places = self._places.get(tuple(tokens[end - _NGRAM : end]), [])
        self._lost = not places
        if places:  # the next one further on, or the last there is
            self._at = places[min(bisect_right(places, self._at), len(places) - 1)]


def _grams(tokens: list[int], first: int) -> Iterator[Gram]:
    """What stands before each place from `first` on."""
    return zip(*(tokens[first - _NGRAM + i : -1] for i in range(_NGRAM)), strict=False)
