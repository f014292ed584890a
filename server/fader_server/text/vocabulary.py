"""The base's tokens as the grammar library reads them: bytes and stop tokens. Knows no grammar."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llguidance import LLTokenizer, TokenizerWrapper

from fader_server.text.pieces import Pieces

_MARK = b"\xff"
"""No text holds this byte; to the library a token that begins with it is a control token."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What grammars are compiled against."""

    tokens: LLTokenizer
    size: int
    """Ids at and above it belong to no token."""


class _Table:
    """What the library asks of a tokenizer."""

    bos_token_id: int | None = None

    def __init__(self, tokens: list[bytes], eos: int, special: list[int]) -> None:
        self.tokens: Sequence[bytes] = tokens
        self.eos_token_id = eos
        self.special_token_ids = special

    def __call__(self, text: bytes) -> list[int]:
        """How a text is tokenised: for forcing one way to write what can be written in several.
        Grammars here force none, so nobody asks; the library tries it once, when it is made."""
        raise NotImplementedError


def read_vocabulary(pieces: Pieces, size: int, stops: Iterable[int]) -> Vocabulary:
    """The tokens 0 to `size` by the text each adds. Takes a second for a hundred thousand.

    A stop token ends an output and is no part of it, whatever text it would show. Without any the
    end has a token of its own, beyond all that there are.
    """
    ends = sorted(token for token in set(stops) if 0 <= token < size)
    silent = {token for token in range(size) if pieces.is_silent(token)}.union(ends)
    table = [
        _MARK + b"%d" % token if token in silent else pieces.piece(token) for token in range(size)
    ]
    if not ends:
        ends = [size]
        table.append(_MARK + b"end")
    special = sorted(silent.union(ends))
    wrapped = TokenizerWrapper(_Table(table, ends[0], special))
    tokens = LLTokenizer(wrapped, eos_token=ends, slices=LLTokenizer.json_slices())
    return Vocabulary(tokens, size)
