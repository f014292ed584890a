"""What a model thinks before it answers, told apart from the answer by two tokens of its own.

Knows tokens and their text; nothing of chats, tools or HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tokenizers

from fader_server.core import Guide
from fader_server.text.detokenizer import Detokenizer
from fader_server.text.pieces import Pieces

_KINDS = (
    ("<think>", "</think>", ""),
    ("[THINK]", "[/THINK]", ""),
    ("<|START_THINKING|>", "<|END_THINKING|>", ""),
    ("<seed:think>", "</seed:think>", ""),
    ("<|channel>", "<channel|>", "thought"),
)
"""What begins and ends a thought, and a word behind the first: Qwen's and DeepSeek's, Mistral's,
Cohere's, Seed's, Gemma's."""
State = Literal["maybe", "open", "closed"]
"""Of an output: it may begin with a thought, is in one, or has none any more."""


@dataclass(frozen=True, slots=True)
class Markers:
    """The tokens around a thought, each a single one of the vocabulary."""

    begin: int
    end: int
    names: tuple[str, str]
    label: str
    """Behind the first, no part of the thought; may be empty."""
    added: frozenset[int]
    """All tokens that are no part of a text: the last one before an output begins it."""

    def state_after(self, prompt: Sequence[int]) -> State:
        """Of an output after a chat, whose last words may begin a thought, or leave an empty one.

        Thoughts of earlier answers are not among them: a token of the template parts the answers.
        """
        for token in reversed(prompt):
            if token in (self.begin, self.end):
                return "open" if token == self.begin else "closed"
            if token in self.added:
                break
        return "maybe"

    def after(self, state: State, token: int) -> State:
        """Of the output, one token on. It is the thought's if the state before or after is open."""
        if state == "open":
            return "closed" if token == self.end else "open"
        return "open" if state == "maybe" and token == self.begin else "closed"


def find_markers(backend: tokenizers.Tokenizer, template: str) -> Markers | None:
    """Those that a chat template has; None: it has none, or they are no tokens."""
    added = {entry.content: token for token, entry in backend.get_added_tokens_decoder().items()}
    for begin, end, label in _KINDS:
        if end in template and begin in added and end in added:
            tokens = frozenset(token for name, token in added.items() if name.strip())
            return Markers(added[begin], added[end], (begin, end), label, tokens)
    return None


class Thought:
    """Takes the tokens of one output as long as they are thought, and gives their text.

    Line breaks at its borders, and blanks before the answer, belong to neither text.
    """

    def __init__(self, pieces: Pieces, markers: Markers, prompt: Sequence[int]) -> None:
        self._pieces = pieces
        self._markers = markers
        self._state: State = markers.state_after(prompt)
        self._detokenizer = Detokenizer(pieces)
        self._held = ""
        self._label = markers.label
        self._told = False
        self._between = False
        self.tokens = 0
        """Of the thought, its markers included."""

    def take(self, token: int) -> str | None:
        """The thought's text that is certain now; None: the token is the answer's."""
        before, self._state = self._state, self._markers.after(self._state, token)
        if "open" in (before, self._state):
            self.tokens += 1
            if before == "maybe":
                return ""
            self._between = self._state == "closed"
            return self.finish() if self._between else self._shown(self._detokenizer.feed(token))
        if self._between and (piece := self._pieces.piece(token)) and not piece.strip():
            return ""
        self._between = False
        return None

    def finish(self) -> str:
        """The rest of the thought, once, when it or the output ends."""
        return self._shown(self._detokenizer.flush())

    def _shown(self, text: str) -> str:
        """Without line breaks before it; those at its end wait for more."""
        whole = self._held + text
        if self._label:
            if whole != self._label and self._label.startswith(whole):
                self._held = whole
                return ""
            whole, self._label = whole.removeprefix(self._label), ""
        whole = whole if self._told else whole.lstrip("\r\n")
        shown = whole.rstrip("\r\n")
        self._held = whole[len(shown) :]
        self._told = self._told or bool(shown)
        return shown


class ThoughtGuide:
    """A core.Guide that leaves a thought alone and guides what comes after it."""

    def __init__(self, guide: Guide, markers: Markers, state: State, free: bytes) -> None:
        """free: what may come in a thought: all but what ends an output."""
        self._guide = guide
        self._markers = markers
        self._state: State = state
        self._free = free

    @property
    def ended(self) -> bool:
        return self._state != "open" and self._guide.ended

    def allowed(self) -> bytes:
        if self._state == "open":
            return self._free
        bits = self._guide.allowed()
        return _with(bits, self._markers.begin) if self._state == "maybe" else bits

    def accept(self, token: int) -> None:
        before, self._state = self._state, self._markers.after(self._state, token)
        if "open" not in (before, self._state):
            self._guide.accept(token)


def all_but(size: int, tokens: frozenset[int]) -> bytes:
    """A bit for each of `size` ids, lowest first, set but for these."""
    bits = (1 << size) - 1
    for token in tokens:
        bits &= ~(1 << token)
    return bits.to_bytes(-(-size // 8), "little")


def _with(bits: bytes, token: int) -> bytes:
    at, bit = divmod(token, 8)
    made = bytearray(bits.ljust(at + 1, b"\0"))
    made[at] |= 1 << bit
    return bytes(made)
