"""Answers in harmony's channels, token by token: which message each is of, and what is thought.

Only marks, and heads that can be read, show no text: what stands elsewhere is a message of its own.
"""

from collections.abc import Sequence

from fader_server.text.detokenizer import Detokenizer
from fader_server.text.harmony import (
    CHANNEL,
    CHANNELS,
    CONSTRAIN,
    ROLE,
    Harmony,
    Head,
    Mark,
    may_be_head,
    read_head,
)
from fader_server.text.pieces import Pieces
from fader_server.text.tool_scan import SILENT

_IN_HEADS: dict[Mark, str] = {"channel": CHANNEL, "constrain": CONSTRAIN}
Event = Head | int | str | None
"""Of what is no thought: a message begins, its text comes, mostly by tokens, it ends."""


class Channels:
    """Takes all tokens of one output: a Thought, which leaves events to a ChannelStream.

    Of several thoughts each begins a line.
    """

    def __init__(self, pieces: Pieces, harmony: Harmony, prompt: Sequence[int]) -> None:
        """prompt: of a chat; it ends in the message that the output begins with."""
        self._pieces = pieces
        self._marks = harmony.marks
        self._head: str | None = None
        self._body: Head | None = None
        """Of the message whose text comes; neither it nor a head: between two messages."""
        self._detokenizer = Detokenizer(pieces)
        """Of a head, or of a thought."""
        self._events: list[Event] = []
        self._thought = ""
        self._parted = self._told = False
        self._pending = 0
        """Tokens of a head: it is not known yet what of."""
        self.tokens = 0
        """Of thoughts, their heads and marks included."""
        self._begin(open_message(harmony, prompt))

    def _begin(self, prompt: Sequence[int]) -> None:
        """The text of a message is the prompt's, its head is for both."""
        for token in prompt:
            self.take(token)
        self._events = [event for event in self._events if not isinstance(event, int | str)]
        self._thought = ""
        self._told = False
        self._pending = self.tokens = 0

    def take(self, token: int) -> str | None:
        """The thought's text that is certain now; None: the token is of something else."""
        thought = self._thinks
        mark = self._marks.get(token)
        if mark is not None:
            self._mark(mark)
        elif self._head is not None:
            self._add_to_head(token)
        else:
            if self._body is None:
                self._open(Head(""))
            self._add(token)
        if thought or self._thinks:
            self.tokens += self._pending + 1
        self._pending = self._pending + 1 if self._head is not None else 0
        return None if self._events else self._taken()

    def finish(self) -> str:
        """The rest of the thought, once, when no more tokens come."""
        self._close()
        return self._taken()

    def events(self) -> list[Event]:
        """Since this was asked."""
        events, self._events = self._events, []
        return events

    @property
    def _thinks(self) -> bool:
        return self._body is not None and self._body.is_thought

    def _taken(self) -> str:
        thought, self._thought = self._thought, ""
        return thought

    def _mark(self, mark: Mark) -> None:
        if self._head is not None and not self._detokenizer.whole:
            self._unread(self._head + self._detokenizer.flush())
        if mark in _IN_HEADS and self._head is not None:
            self._head += _IN_HEADS[mark]
        elif mark == "message":
            if self._body is None:
                self._open(read_head(self._head or ""))
        elif mark != "constrain":
            self._close()
            if mark in ("start", "channel"):
                self._head = "" if mark == "start" else ROLE + CHANNEL
                self._detokenizer = Detokenizer(self._pieces)

    def _add_to_head(self, token: int) -> None:
        assert self._head is not None
        text = self._head + self._detokenizer.feed(token)
        if may_be_head(text) or not self._detokenizer.whole:
            self._head = text
        else:
            self._unread(text)

    def _unread(self, text: str) -> None:
        """A head is none: what it says is text, but for the role or the channel before it."""
        to, marked, said = text.rpartition(CHANNEL)
        if marked:
            channel = read_head(text).channel
            channel = channel if channel in CHANNELS else ""
            said = said.lstrip().removeprefix(channel) if channel else said
            said = f"{_without_role(to)} {said}" if "to=" in to else said
        else:
            channel, said = "", _without_role(text)
        self._open(Head("", channel, broken=True))
        self._add(said.translate(SILENT))

    def _open(self, head: Head) -> None:
        self._head, self._body = None, head
        self._detokenizer = Detokenizer(self._pieces)
        self._parted = True
        if not head.is_thought:
            self._events.append(head)

    def _add(self, said: int | str) -> None:
        if not self._thinks:
            self._events.append(said)
        else:
            self._think(said if isinstance(said, str) else self._detokenizer.feed(said))

    def _close(self) -> None:
        if self._head is not None:
            self._head += self._detokenizer.flush()
            if _is_text(self._head):
                self._unread(self._head)
        if self._thinks:
            self._think(self._detokenizer.flush())
        elif self._body is not None:
            self._events.append(None)
        self._head = self._body = None

    def _think(self, text: str) -> None:
        if text:
            self._thought += "\n" + text if self._parted and self._told else text
            self._parted, self._told = False, True


def open_message(harmony: Harmony, prompt: Sequence[int]) -> Sequence[int]:
    """The tokens at a prompt's end that are of the message which is begun there."""
    for at in range(len(prompt) - 1, -1, -1):
        if harmony.marks.get(prompt[at]) == "start":
            return prompt[at:]
    return ()


def _is_text(head: str) -> bool:
    """Whether something that has come like a head, and no further, has more to say than such a one
    begins with."""
    _, marked, last = (part.strip() for part in head.rpartition(CHANNEL))
    if "to=" in head:
        return True
    return CONSTRAIN not in last and not any(
        name.startswith(last) for name in (CHANNELS if marked else (ROLE,))
    )


def _without_role(text: str) -> str:
    return text.lstrip().removeprefix(ROLE) if text.lstrip().startswith(ROLE) else text
