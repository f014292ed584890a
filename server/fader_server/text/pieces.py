"""The bytes each token adds to a text, by the tokenizer's decoder. Knows nothing of streams."""

import json
import re
from collections.abc import Iterable
from typing import Any

import tokenizers

from fader_server.errors import ModelUnsupported

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"
_SENTENCEPIECE = {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}


class Pieces:
    """Token id → bytes, so that a text is the UTF-8 of its pieces, whatever the tokenizer.

    Equals the tokenizer's own decode without special tokens and without clean-up of spaces. One
    exception: byte-fallback tokens that are not valid UTF-8 together. There the tokenizers library
    takes back even the valid characters of the run, which text already sent cannot follow.
    Raises ModelUnsupported when pieces in a row do not make up what the tokenizer decodes.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)
        steps = _decoder_steps(backend)
        types = {step["type"] for step in steps}
        self._byte_level = types == {"ByteLevel"}
        spaced = any(_is_space_replacement(step) for step in steps)
        self._sentencepiece = spaced and types <= _SENTENCEPIECE
        self._byte_fallback = "ByteFallback" in types
        self._drops_first_space = any(
            step["type"] == "Metaspace" and step["prepend_scheme"] != "never" for step in steps
        )
        self._strips = sum(step["start"] for step in steps if step["type"] == "Strip")
        self._alphabet = {char: byte for byte, char in enumerate(_byte_alphabet())}
        self._inner: dict[int, bytes] = {}
        self._context = self._find_context()
        self._check()

    def is_silent(self, token: int) -> bool:
        """Whether the token never shows in a text: a special token, or an id of no token."""
        if token in self._special:
            return True
        return token not in self._inner and self._backend.id_to_token(token) is None

    def special_name(self, token: int) -> str | None:
        """The name of a special token; None for any other id."""
        return self._backend.id_to_token(token) if token in self._special else None

    def piece(self, token: int, *, first: bool = False) -> bytes:
        """Bytes of a token inside a text, or as its `first` visible one; b"" for special tokens."""
        if token in self._special:
            return b""
        if first:
            return self._first(token)
        found = self._inner.get(token)
        if found is None:
            found = self._inner[token] = self._compute(token)
        return found

    def _compute(self, token: int) -> bytes:
        name = self._backend.id_to_token(token)
        if name is None:
            return b""
        if self._byte_level:
            codes = [self._alphabet.get(char) for char in name]
            return (
                name.encode()
                if None in codes
                else bytes(code for code in codes if code is not None)
            )
        if self._sentencepiece:
            byte = _BYTE_TOKEN.fullmatch(name) if self._byte_fallback else None
            return bytes([int(byte[1], 16)]) if byte else name.replace(_SPACE, " ").encode()
        before = self._backend.decode(self._context)
        return self._backend.decode([*self._context, token])[len(before) :].encode()

    def _first(self, token: int) -> bytes:
        if self._byte_level:
            return self.piece(token)
        if not self._sentencepiece:
            return self._backend.decode([token]).encode()
        name = self._backend.id_to_token(token) or ""
        if self._drops_first_space and _SPACE in name:
            return name.replace(_SPACE, "").encode()
        piece = self.piece(token)
        strips = min(self._strips, len(piece) - len(piece.lstrip(b" ")))
        return piece[strips:]

    def _find_context(self) -> list[int]:
        """A token to stand before another one, for decoders known by trial only."""
        if self._byte_level or self._sentencepiece:
            return []
        ids = range(self._backend.get_vocab_size(with_added_tokens=True))
        return next(([token] for token in ids if self._backend.decode([token])), [])

    def _check(self) -> None:
        size = self._backend.get_vocab_size(with_added_tokens=True)
        names = (
            (token, self._backend.id_to_token(token)) for token in range(0, size, size // 256 + 1)
        )
        sample = [
            token
            for token, name in names
            if name is not None and token not in self._special and not _BYTE_TOKEN.fullmatch(name)
        ]
        whole = b"".join(self.piece(token, first=at == 0) for at, token in enumerate(sample))
        if whole.decode(errors="replace") != self._backend.decode(sample):
            raise ModelUnsupported(
                "expected a tokenizer whose text is the sum of its tokens (byte-level or "
                "SentencePiece style); this one decodes a token by its neighbours"
            )


def visible_tail(pieces: Pieces, tokens: Iterable[int], count: int) -> list[int]:
    """The last `count` tokens that show. `tokens` come last first."""
    tail: list[int] = []
    for token in tokens:
        if len(tail) == count:
            break
        if not pieces.is_silent(token):
            tail.append(token)
    return tail[::-1]


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]


def _is_space_replacement(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return step["replacement"] == _SPACE
    return (
        step["type"] == "Replace"
        and step["pattern"] == {"String": _SPACE}
        and step["content"] == " "
    )


def _byte_alphabet() -> list[str]:
    """Byte-level BPE's letter for each byte: printable Latin-1 for itself, then U+0100 and on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
