"""Token ids of one stream to text, as it comes. Knows nothing of stop strings."""

import codecs
from collections.abc import Sequence
from typing import Self

from fader_server.text.pieces import Pieces, visible_tail

_CONTEXT = 8
"""Prompt tokens read to know where an output begins: a UTF-8 character has at most 4 bytes."""


class Detokenizer:
    """O(1) a token. Never gives half a character or text that a later token changes.

    Bytes that are no UTF-8 become U+FFFD, one per maximal invalid part.
    """

    def __init__(self, pieces: Pieces, *, after: Sequence[int] = ()) -> None:
        """after: a prompt the text continues; without one a leading space is the tokenizer's."""
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        for token in visible_tail(pieces, reversed(after), _CONTEXT):
            self._first = False
            self._utf8.decode(pieces.piece(token))

    def copied(self) -> Self:
        """Another one that goes on from here."""
        other = type(self)(self._pieces)
        other._utf8.setstate(self._utf8.getstate())
        other._first = self._first
        return other

    @property
    def whole(self) -> bool:
        """Whether no character is unfinished."""
        return not self._utf8.getstate()[0]

    def feed(self, token: int) -> str:
        """The text that is certain now."""
        if self._pieces.is_silent(token):
            return ""
        piece = self._pieces.piece(token, first=self._first)
        self._first = False
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """What an unfinished character leaves."""
        return self._utf8.decode(b"", final=True)
